"""Does a small model read texts four times as long as those it was trained on? The bars of docs/long-context.md.

    python benchmarks/long_context.py --data BOOKS.jsonl TEXTBOOKS.jsonl ...

Trains a model of about a million parameters on rows of 128 tokens, then stretches it with YaRN and trains it a tenth as
long on rows of 512; and a third one as long again on rows of 128, for what the updates alone bring. Long documents
only; every fiftieth is held out. Measures bits per byte of the held-out ones by position: read in pieces of 128, whole
without scaling, whole with each scaling and no training, whole after training.
Writes results.json and curve.svg, and ends with code 1 where a bar is missed:

- YaRN without training recovers at least half of the bits per byte that reading on without scaling loses;
- after training, 512 tokens cost at most 2% more bits per byte than pieces of the trained length, read by the model
  that trained as long on such pieces.

Half an hour or less on one core. Finished parts are not done again.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

from minnow.data.prepare import DataConfig
from minnow.data.readers import read_texts
from minnow.evaluation import Subject, evaluate
from minnow.evaluation.long_context import LongTexts
from minnow.evaluation.statistics import Interval
from minnow.model.config import ModelConfig
from minnow.model.context import extend_context
from minnow.model.pretrained import load_pretrained
from minnow.optim import OptimConfig, ScheduleConfig
from minnow.report.long_context import long_context_figure
from minnow.report.plots import save_figure
from minnow.stages import pretrain
from minnow.tokenizer import Tokenizer, train_tokenizer
from minnow.training.config import TrainingConfig

TRAINED, FACTOR = 128, 4
LONG = 3000  # bytes: more than 512 tokens
SHAPE = ModelConfig(
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
)


def prepare_texts(paths: list[str], work: Path) -> None:
    """train.jsonl, held_out.jsonl and the tokenizer."""
    if (work / "tokenizer" / "tokenizer.json").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    texts = [text for text in read_texts(tuple(paths)) if len(text.encode()) >= LONG]
    training = [text for place, text in enumerate(texts) if place % 50]
    for name, rows in (("held_out", texts[::50]), ("train", training)):
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in rows)
        (work / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    train_tokenizer(training, 2048).save_pretrained(work / "tokenizer")


def train(work: Path, steps: int) -> None:
    """The model of the trained length, the stretched one, and one that trained as long without being stretched."""
    training = TrainingConfig(
        steps=steps, batch_tokens=4096, micro_batch_tokens=4096, validate_every=0, device="cpu", precision="fp32"
    )
    base = pretrain.Config(
        run=str(work / "trained"),
        tokenizer=str(work / "tokenizer"),
        data=DataConfig(
            paths=(str(work / "train.jsonl"),),
            validation_paths=(str(work / "held_out.jsonl"),),
            cache_dir=str(work / "cache"),
        ),
        sequence_length=TRAINED,
        model=SHAPE,
        training=training,
        optim=OptimConfig(matrix_lr=0.01, embedding_lr=0.006, norm_lr=0.005),
        schedule=ScheduleConfig(warmup_steps=20),
    )
    longer = replace(
        base,
        run=str(work / "longer"),
        tokenizer=None,
        model=ModelConfig(),
        init_from=base.run,
        rope_scaling="yarn",
        sequence_length=TRAINED * FACTOR,
        training=replace(training, steps=max(1, steps // 10)),
        optim=OptimConfig(matrix_lr=0.003, embedding_lr=0.002, norm_lr=0.002),
        schedule=ScheduleConfig(warmup_steps=5, decay_fraction=0.9),
    )
    as_long = replace(longer, run=str(work / "as-long"), rope_scaling=None, sequence_length=TRAINED)
    for config in (base, longer, as_long):
        pretrain.run(config)


def examine(work: Path) -> dict[str, Interval]:
    """Bits per byte by reading and position."""
    figures: dict[str, Interval] = {}
    texts = list(read_texts((str(work / "held_out.jsonl"),)))
    tokenizer = Tokenizer.from_pretrained(work / "tokenizer")

    def read(run: str, scaling: str | None, names: dict[str, str]) -> None:
        model = load_pretrained(work / run)
        if scaling is not None:
            model.config = extend_context(model.config, scaling, FACTOR)  # type: ignore[arg-type]
        task = LongTexts(Subject(model, tokenizer), texts, TRAINED * FACTOR)
        for name, bar in evaluate(model, tokenizer, [task])[0].figures.items():
            reading, _, place = name.partition("/")
            if reading in names:
                figures[f"{names[reading]}/{place}"] = bar

    read("trained", None, {"in pieces": "in pieces", "as it is": "as it is", "yarn": "yarn"})
    read("longer", None, {"as it is": "after training"})
    read("as-long", None, {"in pieces": "pieces as long"})
    read("trained", "ntk", {"as it is": "ntk"})
    read("trained", "linear", {"as it is": "linear"})
    return figures


def main() -> int:
    """Prepare, train, examine, judge."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=[])
    parser.add_argument("--steps", type=int, default=700)
    parser.add_argument("--work", type=Path, default=Path("runs/long-context"))
    options = parser.parse_args()
    prepare_texts(options.data, options.work)
    train(options.work, options.steps)
    figures = examine(options.work)
    bars = {name: {"value": bar.value, "low": bar.low, "high": bar.high} for name, bar in figures.items()}
    (options.work / "results.json").write_text(json.dumps(bars, indent=2) + "\n", encoding="utf-8")
    curves = {
        name: bar for name, bar in bars.items() if name.partition("/")[0] not in ("ntk", "linear", "pieces as long")
    }
    save_figure(
        long_context_figure(curves, {}, TRAINED, f"trained on {TRAINED} tokens, read up to {TRAINED * FACTOR}"),
        options.work / "curve.svg",
    )
    whole = {name.partition("/")[0]: bar.value for name, bar in figures.items() if name.endswith("/all")}
    for name, value in whole.items():
        print(f"{name:<16} {value:.4f} bits per byte")
    recovered = (whole["as it is"] - whole["yarn"]) / (whole["as it is"] - whole["in pieces"])
    excess = whole["after training"] / whole["pieces as long"] - 1
    print(f"YaRN without training recovers {recovered:.0%} of the loss (bar: 50%)")
    print(f"after training {excess:+.1%} beside pieces of the trained length after as many updates (bar: +2%)")
    return 0 if recovered >= 0.5 and excess <= 0.02 else 1


if __name__ == "__main__":
    raise SystemExit(main())
