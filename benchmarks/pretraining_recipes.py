"""Our pretraining recipe beside minimind's and beside AdamW, on the same text, shape and held-out split.

    python benchmarks/pretraining_recipes.py --data $MINNOW_DATA/pretrain/*.zst --tokens 8000000 --seeds 0 1 2

Arms: `minnow` (Muon, WSD, packed rows), `adamw-LR` (AdamW + cosine with our packing and batch, one arm a rate; with our
initialisation, or as `adamw-LR-normal` with N(0, 0.02) on every matrix; as `adamw-LR-split` with that rate on the
matrices and --embedding-lr on embeddings and norms) and `minimind` (AdamW 5e-4, cosine to 10%, no
warm-up, default betas and decay on everything, rows of at most 340 tokens padded to that length, mean of micro-batch
means, N(0, 0.02) initialisation). Two things are kinder to it than its own code: a long document becomes several rows,
where that drops all but the first 340 tokens; and everybody is judged on held-out rows of 340 tokens, the length it was
trained at. The same tokenizer and the same validation rows throughout.
Tokens are real ones: padding and filler do not count. Writes one JSON line a run (every validation, with tokens and
seconds of processor time, validations included) and the model itself, and draws the curves; `--summarise` prints the
table from the file. A run that was stopped goes on when the same command is given again; one that ended begins anew.
For two arms side by side on two cores: OMP_NUM_THREADS=1 and one process an arm.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import torch
from matplotlib.figure import Figure
from real_text import RealText, prepare_text

from minnow.data.batches import Batch, PackedDataset, Share
from minnow.data.shards import Shards
from minnow.data.shuffle import permutation
from minnow.model.config import ModelConfig
from minnow.model.init import InitConfig
from minnow.model.presets import PRESETS
from minnow.model.pretrained import save_pretrained
from minnow.model.size import training_flops_per_token
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.report.plots import save_figure
from minnow.training.config import TrainingConfig
from minnow.training.objective import BatchSource, LanguageModeling, Objective, ObjectiveOutput, PackedBatches
from minnow.training.session import Machine
from minnow.training.trainer import Trainer

SEQUENCE_LENGTH = 512
MINIMIND_LENGTH = 340
SHAPES = PRESETS | {  # one small enough to sweep on a CPU, with --vocab-size 2048 and --batch-tokens 8192
    "1m": replace(
        PRESETS["5m"],
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
}


class PaddedRows:
    """minimind's batches: every row one piece of a document, at most 340 tokens, padded to 340."""

    def __init__(self, shards: Shards, seed: int, rows: int, micro_rows: int) -> None:
        self.shards, self.seed, self.rows, self.micro_rows = shards, seed, rows, micro_rows
        self.pieces = [
            (document, start)
            for document, length in enumerate(shards.lengths.tolist())
            for start in range(0, length - 1, MINIMIND_LENGTH)  # a document of n tokens has n - 1 targets
        ]

    @property
    def tokens_per_row(self) -> float:
        """Real tokens of a row, in the mean."""
        return float(self.shards.lengths.sum() - len(self.shards.lengths)) / len(self.pieces)

    def micro_batches(self, step: int, share: Share) -> list[Batch]:
        assert share.world_size == 1
        pieces = len(self.pieces)
        epoch, first = divmod(step * self.rows, pieces)
        order = permutation(pieces, self.seed, epoch)
        chosen = [self.pieces[int(order[(first + i) % pieces])] for i in range(self.rows)]
        return [self._batch(chosen[i : i + self.micro_rows]) for i in range(0, self.rows, self.micro_rows)]

    def _batch(self, pieces: Sequence[tuple[int, int]]) -> Batch:
        rows, T = len(pieces), MINIMIND_LENGTH
        tokens, targets = torch.zeros(rows, T, dtype=torch.int64), torch.zeros(rows, T, dtype=torch.int64)
        weights = torch.zeros(rows, T)
        borders = [0]
        for row, (document, start) in enumerate(pieces):
            end = min(start + T + 1, int(self.shards.lengths[document]))
            ids = torch.from_numpy(self.shards.tokens(document, start, end).astype("int64"))
            length = len(ids) - 1
            tokens[row, :length], targets[row, :length], weights[row, :length] = ids[:-1], ids[1:], 1.0
            borders += [row * T + length] * (length < T) + [(row + 1) * T]
        positions = torch.arange(T).expand(rows, -1).contiguous()
        return Batch(
            tokens_BT=tokens,
            targets_BT=targets,
            weights_BT=weights,
            positions_BT=positions,
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            filler_BT=weights == 0,
            document_ids=tuple((document,) for document, _ in pieces),
        )


class MeanOfMeans:
    """minimind's normalisation: every micro-batch's mean counts the same, however many tokens it has (bug E2)."""

    def __init__(self) -> None:
        self.inner = LanguageModeling()

    def count(self, batch: Batch) -> float:
        return 1.0

    def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
        output = self.inner(model, batch)
        tokens = self.inner.count(batch)
        return ObjectiveOutput(output.loss_sum / tokens, {k: v / tokens for k, v in output.metrics.items()})


def run_arm(arm: str, seed: int, options: argparse.Namespace, text: RealText) -> dict:
    shape = replace(shape_of(options), max_position_embeddings=SEQUENCE_LENGTH)
    ours = OptimConfig(matrix_lr=options.muon_lr, embedding_lr=options.embedding_lr)
    objective: Objective = LanguageModeling(z_loss=1e-4)
    source: BatchSource
    rows = options.batch_tokens // SEQUENCE_LENGTH
    packed = PackedDataset(text.train, SEQUENCE_LENGTH, split_documents=True, seed=seed)
    source = PackedBatches(packed, seed, rows, max(1, options.micro_batch_tokens // SEQUENCE_LENGTH))
    steps = round(options.tokens / options.batch_tokens)
    model = CausalLM(shape, InitConfig(embedding_std=options.embedding_std), seed=seed)
    if arm == "minnow":
        optim, schedule = ours, ScheduleConfig(warmup_steps=options.warmup)
    elif arm.startswith("adamw-"):
        rate = float(arm.split("-")[1])
        optim = OptimConfig(optimizer="adamw", matrix_lr=rate, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
        if arm.endswith("-split"):
            optim = replace(optim, embedding_lr=options.embedding_lr, norm_lr=options.embedding_lr)
        schedule = ScheduleConfig(shape="cosine", warmup_steps=options.warmup, final_fraction=0.1)
    elif arm == "minimind":
        optim = OptimConfig(optimizer="adamw", matrix_lr=5e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
        schedule = ScheduleConfig(shape="cosine", warmup_steps=0, final_fraction=0.1)
        objective = MeanOfMeans()
        source = PaddedRows(text.train, seed, 256, 32)
        steps = round(options.tokens / (256 * source.tokens_per_row))
    else:
        raise SystemExit(f"no arm called {arm}")
    if arm == "minimind" or arm.endswith("-normal"):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 2:
                    parameter.normal_(0, 0.02, generator=generator)
    if arm == "minimind" or arm.startswith("adamw"):
        for name, parameter in model.named_parameters():
            if name.endswith(("q_norm.weight", "k_norm.weight")):
                torch.nn.init.ones_(parameter)
    config = TrainingConfig(
        steps=steps, validate_every=max(1, steps // options.points), save_every=0, log_every=10, clip_norm=1.0
    )
    machine = Machine.choose(config)
    flops = options.tokens * training_flops_per_token(shape, SEQUENCE_LENGTH / 4)
    machine.place(model, config, flops, print)
    optimizers = build_optimizers(model, optim, tokens_per_batch=options.batch_tokens)
    if arm == "minimind":
        for group in optimizers[0].param_groups:  # ours leave norms and embeddings alone
            group["weight_decay"] = optim.weight_decay
    folder = run_folder(arm, seed, options)
    clock = ProcessorClock()
    trainer = Trainer(
        config,
        folder=folder,
        title=f"{arm} seed {seed}",
        model=model,
        optimizers=optimizers,
        schedule=schedule,
        objective=objective,
        source=source,
        total_steps=steps,
        validation=text.validation(machine.device),
        evaluations=[clock],
    )
    if trainer.resume():
        clock.go_on_from(trainer.metrics.read(), trainer.state.step)
    trainer.fit()
    save_pretrained(model, folder / "model", text.tokenizer)
    records = trainer.metrics.read()
    training = [r for r in records if "loss" in r]
    per_step = training[-1]["tokens"] / training[-1]["step"]
    points = [
        {
            "tokens": round(r["step"] * per_step),
            "seconds": r["processor_seconds"],
            "bpb": r["bits_per_byte"],
            "loss": r["validation_loss"],
        }
        for r in records
        if "bits_per_byte" in r
    ]
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
    parameters = sum(p.numel() for p in model.parameters())
    return {"arm": arm, "seed": seed, "tokens": options.tokens, "parameters": parameters, "points": points}


class ProcessorClock:
    """Seconds of processor time since the run began, for each validation's line."""

    def __init__(self) -> None:
        self.zero = time.process_time()

    def go_on_from(self, records: Sequence[dict], step: int) -> None:
        """After a restart: the steps since the last reading are taken to have been as slow as those before it."""
        readings = [r for r in records if "processor_seconds" in r and r["step"]]
        if readings:
            self.zero = time.process_time() - readings[-1]["processor_seconds"] * step / readings[-1]["step"]

    def __call__(self, model: CausalLM) -> dict[str, float]:
        return {"processor_seconds": time.process_time() - self.zero}


def run_folder(arm: str, seed: int, options: argparse.Namespace) -> Path:
    """The run's folder: with its checkpoints if the same run was stopped, else empty."""
    folder = Path(options.work) / f"{arm}-seed{seed}"
    elsewhere = ("arms", "seeds", "work", "out", "figure", "summarise")
    settings = json.dumps({key: value for key, value in vars(options).items() if key not in elsewhere})
    said = folder / "settings.json"
    if not said.exists() or said.read_text() != settings or (folder / "model").exists():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        said.write_text(settings)
    return folder


def shape_of(options: argparse.Namespace) -> ModelConfig:
    return replace(SHAPES[options.shape], vocab_size=options.vocab_size)


def tokens_to_reach(points: Sequence[dict], loss: float, key: str = "tokens") -> float | None:
    """Where the curve first falls to `loss`, interpolated between validations (the first one bounds it from above)."""
    if points[0]["loss"] <= loss:
        return points[0][key]
    for before, after in pairwise(points):
        if before["loss"] >= loss >= after["loss"]:
            share = (before["loss"] - loss) / (before["loss"] - after["loss"])
            return before[key] + share * (after[key] - before[key])
    return None


def told_apart(runs: Sequence[dict]) -> list[dict]:
    """The last run of each arm, seed and number of tokens; an arm with several numbers of tokens becomes several."""
    last = {(run["arm"], run["seed"], run.get("tokens") or run["points"][-1]["tokens"]): run for run in runs}
    sizes = {arm: {tokens for other, _, tokens in last if other == arm} for arm, _, _ in last}
    return [
        run | {"arm": arm if len(sizes[arm]) == 1 else f"{arm} {tokens / 1e6:.1f}M"}
        for (arm, _, tokens), run in last.items()
    ]


def summarise(path: Path, picture: Path) -> None:
    runs = told_apart([json.loads(line) for line in path.read_text().splitlines()])
    arms = sorted({run["arm"] for run in runs})
    figure = Figure(figsize=(9, 5), layout="constrained")
    axes = figure.subplots()
    print(f"{'arm':<16} {'seeds':>5} {'final loss':>12} {'final bits/byte':>16}")
    for arm in arms:
        chosen = [run for run in runs if run["arm"] == arm]
        losses, bits = ([run["points"][-1][key] for run in chosen] for key in ("loss", "bpb"))
        spread = statistics.stdev(losses) if len(losses) > 1 else 0.0
        loss, bpb = statistics.mean(losses), statistics.mean(bits)
        print(f"{arm:<16} {len(chosen):>5} {loss:>7.4f} ±{spread:.4f} {bpb:>16.4f}")
        for run in chosen:
            colour = f"C{arms.index(arm)}"
            label = arm if run is chosen[0] else None
            tokens = [point["tokens"] / 1e6 for point in run["points"]]
            axes.plot(tokens, [point["bpb"] for point in run["points"]], colour, label=label)
    axes.set(xlabel="million tokens trained on", ylabel="held-out bits per byte")
    axes.grid(alpha=0.25, which="both")
    axes.legend(frameon=False)
    save_figure(figure, picture)
    tuned = min((a for a in arms if a.startswith("adamw-")), key=lambda a: _mean_final(runs, a), default=None)
    others = [arm for arm in arms if arm.startswith("minimind")] + ([tuned] if tuned else [])
    for mine in (arm for arm in arms if arm.startswith("minnow")):
        for other in others:
            compare(runs, mine, other)


def compare(runs: Sequence[dict], mine: str, other: str) -> None:
    """Where one arm passes the other's end, and both after the same time."""
    ours, theirs = ([run for run in runs if run["arm"] == arm] for arm in (mine, other))
    goal = _mean_final(runs, other)
    total = statistics.mean(run["points"][-1]["tokens"] for run in theirs)
    for key, whole in (("tokens", total), ("seconds", _mean_seconds(runs, other))):
        shares = [tokens_to_reach(run["points"], goal, key) for run in ours]
        shown = ", ".join("never" if share is None else f"{share / whole:.0%}" for share in shares)
        print(f"{mine} reaches the final loss of {other} ({goal:.4f}) after this share of its {key}: {shown}")
    seconds = min(run["points"][-1]["seconds"] for run in (*ours, *theirs))
    a, b = (statistics.mean(bits_after(run["points"], seconds) for run in those) for those in (ours, theirs))
    print(f"after the same {seconds:.0f} s of a processor: {mine} {a:.4f}, {other} {b:.4f} bits per byte", end=" ")
    print(f"({1 - a / b:.1%} lower)")


def bits_after(points: Sequence[dict], seconds: float) -> float:
    """Bits per byte after so many seconds, interpolated between validations."""
    for before, after in pairwise(points):
        if before["seconds"] <= seconds <= after["seconds"]:
            share = (seconds - before["seconds"]) / (after["seconds"] - before["seconds"])
            return before["bpb"] + share * (after["bpb"] - before["bpb"])
    raise ValueError(f"no validations around {seconds} seconds")


def _mean_final(runs: Sequence[dict], arm: str) -> float:
    return statistics.mean(run["points"][-1]["loss"] for run in runs if run["arm"] == arm)


def _mean_seconds(runs: Sequence[dict], arm: str) -> float:
    return statistics.mean(run["points"][-1]["seconds"] for run in runs if run["arm"] == arm)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--arms", nargs="+", default=["minnow", "adamw-0.002", "minimind"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--tokens", type=float, default=8e6)
    parser.add_argument("--shape", default="5m", choices=SHAPES)
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--muon-lr", type=float, default=0.01)
    parser.add_argument("--embedding-lr", type=float, default=0.004)
    parser.add_argument("--embedding-std", type=float, default=InitConfig.embedding_std)
    parser.add_argument("--validation-tokens", type=int, default=131_072)
    parser.add_argument("--points", type=int, default=16)
    parser.add_argument("--work", default="runs/recipes")
    parser.add_argument("--out", type=Path, default=Path("runs/recipes/results.jsonl"))
    parser.add_argument("--figure", type=Path, help="where the curves go; results.png beside --out if not given")
    parser.add_argument("--summarise", action="store_true", help="run nothing; print the table of --out")
    options = parser.parse_args()
    if not options.summarise:
        work = Path(options.work)
        # packed to 340 tokens a row for the judging; every arm packs or pads its training text itself
        text = prepare_text(
            options.data,
            work,
            vocab_size=options.vocab_size,
            sequence_length=MINIMIND_LENGTH,
            validation_tokens=options.validation_tokens,
        )
        options.vocab_size = text.tokenizer.vocab_size
        for seed in options.seeds:
            for arm in options.arms:
                result = run_arm(arm, seed, options, text)
                options.out.parent.mkdir(parents=True, exist_ok=True)
                with open(options.out, "a") as file:
                    file.write(json.dumps(result) + "\n")
    summarise(options.out, options.figure or options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
