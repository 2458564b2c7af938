"""Run whole stages in the processes of this run: `python -m ...distributed.stages WORLD OUT MODE,MODE NAME ...`."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch

from minnow import cli
from minnow.config import parse_config
from minnow.stages import language_model, rl
from minnow.training.distribution import process_group
from tests.rl.helpers import saved, write_prompts

# As in the matrix of the Trainer, but in fp32: rounding must not be lifted to visible size by AdamW's first steps.
COMMON = {"optim.optimizer": "adamw", "optim.matrix_lr": 3e-4, "optim.eps": 1e-6, "training.device": "cpu"}
COMMON |= {"training.precision": "fp32", "training.compile": "off", "training.save_every": 0}
PACKED = COMMON | {"sequence_length": 128, "training.batch_tokens": 512, "training.micro_batch_tokens": 128}
PACKED |= {"training.steps": 20, "training.validate_every": 10, "data.validation_fraction": 0.1}
SHAPE = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
NEW = {f"model.{key}": value for key, value in (SHAPE | {"num_key_value_heads": 1, "head_dim": 16}).items()}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SOFTMAX = NEW | {f"model.experts.{key}": value for key, value in EXPERTS.items()}
SIGMOID = SOFTMAX | {"model.experts.scoring": "sigmoid", "model.experts.n_shared_experts": 1}
# Rows of one answer each, minibatches of 5 and 4: one of two processes has a micro-batch more than the other.
PLAYED = COMMON | {"phases": 5, "rollout.prompts": 3, "rollout.samples": 3, "rollout.max_tokens": 6}
PLAYED |= {"sequence_length": 48, "training.micro_batch_tokens": 48, "rewards.length": 0.5, "rewards.longest": 4}
PLAYED |= {"algorithm.epochs": 2, "algorithm.minibatches": 2, "watch.patience": 0}

STAGES = {
    "pretrain": ("pretrain", PACKED | NEW),
    "softmax experts": ("pretrain", PACKED | SOFTMAX | {"training.balance.loads": "same_batch"}),
    "sigmoid experts": ("pretrain", PACKED | SIGMOID),
    "sft": ("sft", PACKED),
    "lora": ("lora", PACKED),
    "dpo": ("dpo", PACKED),
    "reward": ("reward", PACKED),
    "reward of adapters": ("reward", PACKED | {"lora.rank": 4}),
    "distill": ("distill", PACKED | NEW),
    "grpo": ("grpo", PLAYED),
    "grpo of adapters": ("grpo", PLAYED | {"lora.rank": 4}),
    "ppo": ("ppo", PLAYED | {"rollout.samples": 1, "rollout.prompts": 9, "algorithm.critic.warmup_phases": 1}),
}
FILES = {"pretrain": "texts", "sft": "talks", "lora": "talks", "distill": "talks", "dpo": "pairs", "reward": "pairs"}


def write_world(folder: Path) -> None:
    """A model that is trained on, and rows of every kind; answers of very different lengths make uneven masks."""
    saved(folder / "start")
    write_prompts(folder / "prompts.jsonl", 9)
    numbers = [" ".join(str(digit) for digit in range(n % 10)) for n in range(160)]
    rows = {
        "texts": [{"text": f"say {said} {n} it is so {said}"} for n, said in enumerate(numbers)],
        "pairs": [{"prompt": f"say {n}", "chosen": f"{n} {said}", "rejected": "no"} for n, said in enumerate(numbers)],
        "talks": [
            {"messages": [{"role": "user", "content": f"say {n}"}, {"role": "assistant", "content": f"{n} {said}"}]}
            for n, said in enumerate(numbers)
        ],
    }
    for name, content in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in content))


def train_stage(name: str, mode: str, world: Path, run: Path) -> None:
    """Run the stage of STAGES in this process, as one of those that are joined already."""
    command, settings = STAGES[name]
    places: dict[str, object] = {"init_from": world / "start"}
    if command in FILES:
        places |= {"data.paths": world / f"{FILES[command]}.jsonl", "data.cache_dir": run.parent / "cache"}
    else:
        places |= {"prompts": world / "prompts.jsonl", "held_out": world / "prompts.jsonl"}
    if any(key in settings for key in NEW):
        del places["init_from"]
        places["tokenizer"] = world / "start"
    if command == "distill":
        places["teacher"] = world / "start"
    every = {**settings, **places, "run": run, "training.parallel": mode}
    words = [word for key, value in every.items() for word in (f"--{key}", str(value))]
    stage = importlib.import_module(f"minnow.stages.{cli.COMMANDS[command].module}")
    stage.run(parse_config(stage.Config, cli.with_preset(command, words), program=f"minnow {command}"))


def main(world: Path, out: Path, modes: list[str], names: list[str]) -> None:
    """Every stage of `names` in every mode, without the reports: they are another test's."""
    language_model.write_report = rl.write_report = lambda folder: folder
    for mode in modes:
        for name in names:
            train_stage(name, mode, world, out / mode / name)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with process_group(cuda=False):
        main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","), sys.argv[4:])
