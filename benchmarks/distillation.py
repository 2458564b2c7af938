"""Does a teacher help? The same student, the same tokens, with and without it, over several seeds.

    minnow data pond --out pond
    python benchmarks/distillation.py --base_teacher runs/teacher/pretrain --teacher runs/teacher/sft --pond pond \
        --work runs/distillation --seeds 3

The student is pretrained and fine-tuned on the pond twice for each seed, alone and beside the teacher (pretraining
beside the teacher's base model, fine-tuning beside the fine-tuned one), and examined in held-out bits per byte and
held-out questions. Prints each difference (with the teacher minus without) as mean and standard error over the seeds;
it counts when it is larger than twice that.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from minnow.data.prepare import DataConfig
from minnow.evaluation.statistics import mean_and_standard_error
from minnow.model.config import ModelConfig
from minnow.objectives.distillation import DistillationLossConfig
from minnow.optim import OptimConfig
from minnow.stages import distill, pretrain, sft
from minnow.stages import eval as evaluation
from minnow.stages.language_model import LanguageModelConfig
from minnow.training.config import TrainingConfig

STUDENT = ModelConfig(  # 2.05M parameters with the pond's vocabulary of 1,700
    hidden_size=192,
    intermediate_size=576,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=32,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base_teacher", required=True, help="run of the teacher's pretraining")
    parser.add_argument("--teacher", required=True, help="run of the teacher's fine-tuning")
    parser.add_argument("--pond", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=300, help="updates of pretraining, 8,192 tokens each")
    parser.add_argument("--sft_steps", type=int, default=50)
    parser.add_argument("--alpha", type=float, default=0.3, help="weight of the labels; the rest is the teacher's")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--max_rows", type=int, default=None, help="questions to examine at most")
    parser.add_argument("--only", help="one run, such as taught-1, and no table: to share the runs out over cores")
    options = parser.parse_args()
    if options.only is not None:
        arm, _, seed = options.only.partition("-")
        print(one_run(options, int(seed), arm))
        return
    found = {arm: [one_run(options, seed, arm) for seed in range(options.seeds)] for arm in ("alone", "taught")}
    for name in found["alone"][0]:
        alone, taught = ([figures[name] for figures in found[arm]] for arm in ("alone", "taught"))
        mean, error = mean_and_standard_error([t - a for t, a in zip(taught, alone, strict=True)])
        sure = "more than twice its error" if abs(mean) > 2 * error else "within twice its error"
        shown = ", ".join(f"{a:.4f} -> {t:.4f}" for a, t in zip(alone, taught, strict=True))
        print(f"{name:<36} {mean:+.4f} +- {error:.4f} ({sure}): {shown}")


def one_run(options: argparse.Namespace, seed: int, arm: str) -> dict[str, float]:
    """Pretrain, fine-tune, examine; a second call continues what the first one left."""
    folder = Path(options.work) / f"{arm}-{seed}"
    pond = Path(options.pond)
    first = pretrain.Config(
        run=str(folder / "pretrain"),
        tokenizer=options.teacher,
        model=STUDENT,
        sequence_length=512,
        data=data(options, "pretrain.jsonl"),
        training=training(options.steps, seed),
        optim=OptimConfig(),
    )
    second = dataclasses.replace(
        first,
        run=str(folder / "sft"),
        tokenizer=None,
        init_from=first.run,
        data=data(options, "sft.jsonl"),
        training=training(options.sft_steps, seed),
        optim=OptimConfig(matrix_lr=0.003, embedding_lr=0.0012, norm_lr=0.0015),
    )
    if arm == "taught":
        loss = DistillationLossConfig(alpha=options.alpha, temperature=options.temperature)
        for config, kind, teacher in ((first, "pretrain", options.base_teacher), (second, "sft", options.teacher)):
            settings = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
            distill.run(distill.Config(**settings, teacher=teacher, kind=kind, loss=loss))  # type: ignore[arg-type]
    else:
        pretrain.run(first)
        shared = {field.name: getattr(second, field.name) for field in dataclasses.fields(LanguageModelConfig)}
        sft.run(sft.Config(**shared))
    file = folder / "figures.json"
    evaluation.run(
        evaluation.Config(model=second.run, tasks=("pond",), pond=str(pond), max_rows=options.max_rows, json=str(file))
    )
    answers = json.loads(file.read_text())["tasks"]["pond"]["figures"]
    lines = [json.loads(line) for line in (folder / "pretrain" / "metrics.jsonl").read_text().splitlines()]
    bits = [line["bits_per_byte"] for line in lines if "bits_per_byte" in line][-1]
    return {"bits_per_byte": bits} | {name: bar["value"] for name, bar in answers.items()}


def data(options: argparse.Namespace, name: str) -> DataConfig:
    return DataConfig(paths=(str(Path(options.pond) / name),), cache_dir=str(Path(options.work) / "cache"))


def training(steps: int, seed: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps, batch_tokens=8192, seed=seed, validate_every=50, validation_tokens=32_768, save_every=0
    )


if __name__ == "__main__":
    main()
