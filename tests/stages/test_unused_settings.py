"""A setting that somebody gives and nothing reads is refused by name; what every recipe and stage writes is not."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from minnow.cli import COMMANDS, PRESETS
from minnow.config import UserError, config_from_yaml, config_to_yaml, parse_config
from minnow.data.prepare import DataConfig, prepare
from minnow.optim import ScheduleConfig
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
        ("rl", "--algorithm.critic.gamma 0.9", "algorithm.critic.gamma", "only gae"),
        ("rl", "--algorithm.critic.init_from judge", "algorithm.critic.init_from", "only gae"),
        ("rl", "--algorithm.advantage tracker --algorithm.critic.warmup_phases 1", "critic.warmup_phases", "tracker"),
        ("rl", "--algorithm.tracker_answers 4", "algorithm.tracker_answers", "algorithm.curriculum"),
        ("rl", "--algorithm.max_redraws 1", "algorithm.max_redraws", "drop_equal_groups is false"),
        ("rl", "--algorithm.kl_reward_estimator k3", "algorithm.kl_reward_estimator", "kl_reward_coef is 0"),
        (
            "rl",
            "--algorithm.correction_cap null --algorithm.correction_level sequence_sum",
            "algorithm.correction_level",
            "correction_cap is null",
        ),
        ("rl", "--algorithm.target_kl 0.02", "algorithm.target_kl", "only update"),
        ("rl", "--algorithm.loss.surrogate cispo --algorithm.loss.clip_low 0.1", "algorithm.loss.clip_low", "cispo"),
        ("rl", "--algorithm.loss.surrogate cispo --algorithm.loss.dual_clip 3", "algorithm.loss.dual_clip", "cispo"),
        ("rl", "--algorithm.loss.surrogate none --algorithm.loss.clip_high 0.3", "algorithm.loss.clip_high", "none"),
        ("rl", "--algorithm.loss.surrogate none --algorithm.loss.ratio sequence_sum", "algorithm.loss.ratio", "none"),
        ("rl", "--algorithm.loss.kl_estimator k2", "algorithm.loss.kl_estimator", "kl_coef is 0"),
        ("rl", "--algorithm.loss.kl_ratio true", "algorithm.loss.kl_ratio", "kl_coef is 0"),
        ("rl", "--rewards.longest 24", "rewards.longest", "rewards.length is 0"),
        ("rl", "--rewards.overlong_buffer 0.2", "rewards.overlong_buffer", "rewards.overlong is 0"),
        ("rl", "--rewards.reward_model_squash true", "rewards.reward_model_squash", "rewards.reward_model is null"),
        ("rl", "--rewards.judge.model whale", "rewards.judge.model", "rewards.judge.url is null"),
        ("rl", "--rollout_engine.server vllm", "rollout_engine.server", "rollout_engine.url is null"),
        ("rl", "--rollout.thinking_share 0.5", "rollout.thinking_share", "enable_thinking is false"),
        ("distill on-policy", "--rollout.thinking_share 0.5", "rollout.thinking_share", "enable_thinking is false"),
    ],
)
def test_refused_with_its_name_and_its_owner(command: str, words: str, key: str, owner: str) -> None:
    with pytest.raises(UserError, match="no effect") as refused:
        parse(command, words)
    assert key in str(refused.value)
    assert owner in str(refused.value)


def test_what_a_file_set_need_not_be_taken_back_by_whoever_makes_it_idle(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Who changes a recipe's shape to constant has not asked for its final_fraction."""
    config = parse("rl", f"--config {PRESETS / 'ppo.yaml'} --algorithm.loss.surrogate none")
    assert config.algorithm.loss.dual_clip is None  # type: ignore[attr-defined]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("schedule: {shape: linear, warmup_steps: 7, final_fraction: 0}\n")
    config = parse("sft", f"--config {recipe} --schedule.shape constant")
    assert config.schedule == ScheduleConfig(shape="constant", warmup_steps=7)  # type: ignore[attr-defined]
    with pytest.raises(SystemExit):
        parse("sft", f"--config {recipe} --schedule.shape constant --print_config")
    recipe.write_text(capsys.readouterr().out)
    assert parse("sft", f"--config {recipe}") == config


@pytest.mark.parametrize(
    ("command", "yaml", "words"),
    [
        ("dpo", "loss: {name: simpo, simpo_gamma: 2}", "--loss.name dpo"),
        ("sft", "lora: {rank: 8, dora: true, alpha: 4}", "--lora.rank 0"),
        ("sft", "schedule: {shape: cosine_restarts, cycles: 3, final_fraction: 0}", "--schedule.shape constant"),
    ],
)
def test_what_a_file_had_a_use_for_is_asked_of_what_the_file_says(
    command: str, yaml: str, words: str, tmp_path: Path
) -> None:
    """The default of what the command line changed was asked instead, beside which it was idle too."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"{yaml}\n")
    assert parse(command, f"--config {recipe} {words}") == parse(command, words)


@pytest.mark.parametrize(
    ("yaml", "words"),
    [
        ("{shape: constant, final_fraction: 0}", ""),
        ("{shape: constant, final_fraction: 0}", "--schedule.shape constant"),
        ("{shape: constant, final_fraction: 0}", "--schedule.warmup_steps 3"),
        ("{shape: linear}", "--schedule.shape constant --schedule.final_fraction 0"),
        ("{final_fraction: 0}", "--schedule.shape constant --schedule.cycles 3"),
    ],
)
def test_what_was_idle_before_or_is_asked_for_is_refused(yaml: str, words: str, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"schedule: {yaml}\n")
    with pytest.raises(UserError, match="has no effect here: the shape is constant"):
        parse("sft", f"--config {recipe} {words}")


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
        ("rl", "--algorithm.advantage gae --algorithm.critic.gamma 0.9 --algorithm.critic.init_from judge"),
        ("rl", "--algorithm.curriculum true --algorithm.tracker_answers 4"),
        ("rl", "--algorithm.drop_equal_groups true --algorithm.max_redraws 1"),
        ("rl", "--algorithm.loss.kl_coef 0.1 --algorithm.loss.kl_estimator k2 --algorithm.loss.kl_ratio true"),
        ("rl", "--algorithm.loss.surrogate cispo --algorithm.loss.clip_high 4 --algorithm.loss.ratio sequence_sum"),
        ("rl", "--algorithm.minibatches 2 --algorithm.target_kl 0.02"),
        ("rl", "--rewards.length 1 --rewards.longest 24 --rewards.overlong 1 --rewards.overlong_buffer 0.2"),
        ("rl", "--rollout.enable_thinking true --rollout.thinking_share 0.5"),
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
