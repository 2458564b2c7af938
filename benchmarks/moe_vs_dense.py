"""A mixture of experts beside a dense model of equal active FLOPs, on the same tokens of the same text.

    python benchmarks/moe_vs_dense.py --data $MINNOW_DATA/pretrain/*.zst --tokens 8000000 --seeds 0 1 2

The dense model's MLP is made as wide as the experts that work on one token (and the router) cost. Both see the same
batches in the same order and are judged on the same held-out rows. Writes one JSON line a run, and prints the mean
difference of bits per byte (dense - mixture), twice its standard error, and the ratio of step times.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

from real_text import RealText, prepare_text

from minnow.data.batches import PackedDataset
from minnow.model.config import ModelConfig
from minnow.model.experts_config import ExpertsConfig
from minnow.model.size import active_parameter_count, forward_flops_per_token, parameter_count
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.training.config import TrainingConfig
from minnow.training.objective import LanguageModeling, PackedBatches
from minnow.training.session import Machine
from minnow.training.trainer import Trainer


def shapes(options: argparse.Namespace, vocab_size: int) -> dict[str, ModelConfig]:
    """The mixture, and the dense model of equal active FLOPs."""
    experts = ExpertsConfig(
        num_experts=options.experts,
        num_experts_per_tok=options.per_token,
        moe_intermediate_size=options.expert_width,
        scoring=options.scoring,
        n_shared_experts=int(options.scoring == "sigmoid"),
    )
    working = experts.num_experts_per_tok + experts.n_shared_experts
    # A router's E x D weights cost as much as E / 3 units of the dense MLP's width.
    width = working * experts.moe_intermediate_size + round(experts.num_experts / 3)
    dense = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=options.width,
        intermediate_size=width,
        num_hidden_layers=options.layers,
        num_attention_heads=options.width // 64,
        num_key_value_heads=max(1, options.width // 128),
        max_position_embeddings=options.length,
    )
    return {"dense": dense, "moe": replace(dense, experts=experts)}


def train(arm: str, shape: ModelConfig, seed: int, options: argparse.Namespace, text: RealText) -> dict:
    """Train one model; return its held-out bits per byte and its median step time."""
    rows = options.batch_tokens // options.length
    packed = PackedDataset(text.train, options.length, split_documents=True, seed=seed)
    steps = round(options.tokens / options.batch_tokens)
    config = TrainingConfig(
        steps=steps, batch_tokens=options.batch_tokens, validate_every=0, save_every=0, seed=seed, compile="off"
    )
    machine = Machine.choose(config)
    model = CausalLM(shape, seed=seed)
    model.to(machine.device)
    model.compute_dtype = machine.dtype
    folder = Path(options.work) / f"{arm}-seed{seed}"
    shutil.rmtree(folder, ignore_errors=True)
    trainer = Trainer(
        config,
        folder=folder,
        title=f"{arm} seed {seed}",
        model=model,
        optimizers=build_optimizers(model, OptimConfig(), tokens_per_batch=rows * options.length),
        schedule=ScheduleConfig(warmup_steps=min(20, steps // 5)),
        objective=LanguageModeling(z_loss=1e-4),
        source=PackedBatches(packed, seed, rows, max(1, options.micro_batch_tokens // options.length)),
        total_steps=steps,
        validation=text.validation(machine.device),
    )
    trainer.fit()
    records = trainer.metrics.read()
    training = [record for record in records if "loss" in record]
    result = {
        "arm": arm,
        "seed": seed,
        "parameters": parameter_count(shape),
        "active_parameters": active_parameter_count(shape),
        "forward_flops_per_token": forward_flops_per_token(shape, (options.length + 1) / 2),
        "tokens": training[-1]["tokens"],
        "bits_per_byte": next(record["bits_per_byte"] for record in reversed(records) if "bits_per_byte" in record),
        "step_seconds": statistics.median(record["seconds"] for record in training),
        "expert_load_max": training[-1].get("expert_load_max"),
    }
    shutil.rmtree(folder, ignore_errors=True)
    return result


def summarise(results: list[dict]) -> None:
    """Pairs by seed: the mean difference against twice its standard error."""
    by_arm = {arm: {r["seed"]: r for r in results if r["arm"] == arm} for arm in ("dense", "moe")}
    for arm, runs in by_arm.items():
        first = next(iter(runs.values()))
        bits = statistics.mean(run["bits_per_byte"] for run in runs.values())
        print(
            f"{arm:<6} {first['parameters']:>12,} parameters, {first['active_parameters']:>11,} active, "
            f"{first['forward_flops_per_token']:.4g} FLOPs a token: {bits:.4f} bits per byte"
        )
    seeds = sorted(by_arm["dense"].keys() & by_arm["moe"].keys())
    gaps = [by_arm["dense"][s]["bits_per_byte"] - by_arm["moe"][s]["bits_per_byte"] for s in seeds]
    ratio = statistics.median(by_arm["moe"][s]["step_seconds"] / by_arm["dense"][s]["step_seconds"] for s in seeds)
    mean = statistics.mean(gaps)
    print(f"step time, mixture / dense: {ratio:.2f}")
    if len(gaps) < 2:
        print(f"dense - mixture: {mean:+.4f} bits per byte, one seed: says nothing yet")
        return
    twice = 2 * statistics.stdev(gaps) / math.sqrt(len(gaps))
    verdict = "the mixture wins" if mean > twice else "no proof that the mixture wins"
    print(f"dense - mixture: {mean:+.4f} bits per byte, twice the standard error {twice:.4f}: {verdict}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", required=True)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--tokens", type=float, default=8e6)
    parser.add_argument("--vocab-size", type=int, default=6400)
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--per-token", type=int, default=2)
    parser.add_argument("--expert-width", type=int, default=320)
    parser.add_argument("--scoring", choices=("softmax", "sigmoid"), default="softmax")
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--batch-tokens", type=int, default=32_768)
    parser.add_argument("--micro-batch-tokens", type=int, default=8192)
    parser.add_argument("--validation-tokens", type=int, default=131_072)
    parser.add_argument("--work", default="runs/moe")
    options = parser.parse_args()
    work = Path(options.work)
    text = prepare_text(
        options.data,
        work,
        vocab_size=options.vocab_size,
        sequence_length=options.length,
        validation_tokens=options.validation_tokens,
    )
    results = []
    for seed in options.seeds:
        for arm, shape in shapes(options, text.tokenizer.vocab_size).items():  # the arms take turns
            results.append(train(arm, shape, seed, options, text))
            with open(work / "results.jsonl", "a", encoding="utf-8") as file:
                file.write(json.dumps(results[-1]) + "\n")
    summarise(results)


if __name__ == "__main__":
    main()
