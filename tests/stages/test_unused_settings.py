"""A setting that somebody gives and nothing reads is refused by name; what every recipe and stage writes is not."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from minnow.cli import COMMANDS
from minnow.config import UserError, config_from_yaml, config_to_yaml, parse_config
from minnow.data.prepare import DataConfig, prepare
from minnow.tokenizer import train_tokenizer
from minnow.training.config import TrainingConfig

NEEDED = {
    "quickstart": "",
    "dpo": "--init_from m --data.paths d",
    "reward": "--init_from m --data.paths d",
    "distill": "--teacher m --data.paths d",
    "distill on-policy": "--init_from m --teacher m --prompts p",
    "rl": "--init_from m --prompts p",
    "sft": "--init_from m --data.paths d",
    "pretrain": "--data.paths d",
}


def parse(command: str, words: str) -> object:
    config_class = importlib.import_module(f"minnow.stages.{COMMANDS[command].module}").Config
    return parse_config(config_class, f"{NEEDED[command]} {words}".split(), program=f"minnow {command}")


@pytest.mark.parametrize(
    ("command", "words", "key", "owner"),
    [
        ("dpo", "--training.z_loss 1e-4", "training.z_loss", "pretrain"),
        ("reward", "--training.z_loss 0.1", "training.z_loss", "pretrain"),
        ("distill", "--training.z_loss 1e-4", "training.z_loss", "pretrain"),
        ("distill on-policy", "--training.z_loss 1e-4", "training.z_loss", "pretrain"),
        ("rl", "--training.z_loss 1e-4", "training.z_loss", "pretrain"),
        ("rl", "--training.steps 10", "training.steps", "phases"),
        ("rl", "--training.epochs 2", "training.epochs", "phases"),
        ("rl", "--training.batch_tokens 1024", "training.batch_tokens", "rollout.prompts"),
        ("rl", "--training.validation_tokens 1024", "training.validation_tokens", "held_out"),
        ("quickstart", "--pretrain.nproc 2", "pretrain.nproc", "one process"),
        ("quickstart", "--sft.epochs 2", "sft.epochs", "steps"),
        ("rl", "--training.patience 3", "training.patience", "watch.patience"),
        ("distill on-policy", "--training.patience 3", "training.patience", "`data`"),
        ("dpo", "--loss.simpo_gamma 2", "loss.simpo_gamma", "simpo"),
        ("dpo", "--loss.name simpo --loss.desirable_weight 2", "loss.desirable_weight", "kto"),
        ("dpo", "--loss.undesirable_weight 0.5", "loss.undesirable_weight", "kto"),
        ("dpo", "--loss.name orpo --loss.label_smoothing 0.1", "loss.label_smoothing", "dpo or robust or simpo"),
        ("dpo", "--loss.name kto --loss.length_alpha 0.5", "loss.length_alpha", "dpo"),
        ("distill", "--loss.jsd_beta 0.2", "loss.jsd_beta", "jsd"),
        ("sft", "--lora.alpha 32", "lora.alpha", "lora.rank is 0"),
        ("pretrain", "--optim.optimizer adamw --optim.momentum 0.9", "optim.momentum", "adamw, not muon"),
        ("dpo", "--optim.update_scale match_rms_adamw", "optim.update_scale", "adamw, not muon"),
        ("pretrain", "--schedule.shape cosine --schedule.decay_fraction 0.2", "schedule.decay_fraction", "not wsd"),
        ("rl", "--schedule.decay_shape sqrt", "schedule.decay_shape", "constant, not wsd"),
        ("sft", "--schedule.cycles 2", "schedule.cycles", "linear, not cosine_restarts"),
        (
            "rl",
            "--schedule.final_fraction 0.1",
            "schedule.final_fraction",
            "constant, not wsd or cosine or linear or cosine_restarts",
        ),
        ("sft", "--lora.targets q_proj", "lora.targets", "lora.rank is 0"),
    ],
)
def test_refused_with_its_name_and_its_owner(command: str, words: str, key: str, owner: str) -> None:
    with pytest.raises(UserError, match="no effect") as refused:
        parse(command, words)
    assert key in str(refused.value)
    assert owner in str(refused.value)


@pytest.mark.parametrize("kind", ["pretrain", "preference"])
def test_tags_weigh_in_conversations_only(kind: str, tmp_path: Path) -> None:
    data = DataConfig(paths=("nothing.jsonl",), cache_dir=str(tmp_path), tag_weight=10.0)
    with pytest.raises(UserError, match=r"data\.tag_weight is 10\.0, which has no effect.*conversations"):
        prepare(data, train_tokenizer(["fish"], 320), kind, sequence_length=64)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("command", "words"),
    [
        *((command, "") for command in NEEDED),
        ("dpo", "--loss.name simpo --loss.simpo_gamma 2 --loss.label_smoothing 0.1"),
        ("dpo", "--loss.name kto --loss.desirable_weight 2 --loss.undesirable_weight 3"),
        ("distill", "--loss.divergence jsd --loss.jsd_beta 0.2"),
        ("sft", "--lora.rank 4 --lora.alpha 32 --training.z_loss 0.001"),
        ("pretrain", "--optim.momentum 0.9 --schedule.decay_fraction 0.2 --schedule.decay_shape sqrt"),
        ("sft", "--schedule.shape constant"),
        ("rl", "--schedule.shape linear --schedule.final_fraction 0.1"),
        ("dpo", "--optim.optimizer muon --optim.polynomial quintic"),
        ("dpo", "--schedule.shape cosine_restarts --schedule.cycles 2"),
    ],
)
def test_what_has_an_effect_or_was_not_given_passes_and_is_read_back(command: str, words: str, tmp_path: Path) -> None:
    config = parse(command, words)
    file = tmp_path / "config.yaml"
    file.write_text(config_to_yaml(config))
    assert config_from_yaml(type(config), file) == config


def test_z_loss_has_its_default_where_it_counts() -> None:
    assert TrainingConfig().chosen_z_loss == 1e-4
    assert TrainingConfig(z_loss=0.0).chosen_z_loss == 0.0
