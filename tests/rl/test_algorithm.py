"""The settings of an algorithm: what the presets say, and what nothing could be learnt with."""

from __future__ import annotations

from typing import Any

import pytest

from minnow.cli import PRESETS
from minnow.config import UserError, parse_config
from minnow.rl.algorithm import AlgorithmConfig, CriticConfig
from minnow.stages.rl import Config

# advantage; surrogate, ratio, aggregation; clip_low, clip_high; KL in the loss, in the reward. Beside them the papers.
PAPERS: dict[str, tuple[Any, ...]] = {
    "grpo": ("group", "clip", "token", "sequence", 0.2, 0.2, 0.04, 0.0),  # 2402.03300, section 4.2: beta 0.04
    "dr-grpo": ("group_centred", "clip", "token", "constant", 0.2, 0.2, 0.0, 0.0),  # 2503.20783
    "dapo": ("group", "clip", "token", "token", 0.2, 0.28, 0.0, 0.0),  # 2503.14476, section 4.1
    "gspo": ("group", "clip", "sequence_mean", "sequence", 3e-4, 4e-4, 0.0, 0.0),  # 2507.18071, section 5.1
    "cispo": ("group", "cispo", "token", "token", 0.2, 4.0, 0.0, 0.0),  # 2506.13585; the cap 5 of TRL
    "rloo": ("leave_one_out", "clip", "sequence_sum", "sequence", 0.2, 0.2, 0.0, 0.05),  # 2402.14740
    "reinforce++": ("batch", "clip", "token", "token", 0.2, 0.2, 0.0, 0.01),  # 2501.03262
    "ppo": ("gae", "clip", "token", "token", 0.2, 0.2, 0.0, 0.02),  # 1707.06347
    "spo": ("tracker", "clip", "token", "token", 0.2, 0.28, 0.0, 0.0),  # 2509.13232
}


def test_the_presets_are_all_here() -> None:
    assert sorted(PAPERS) == sorted(file.stem for file in PRESETS.glob("*.yaml"))


@pytest.mark.parametrize("preset", list(PAPERS))
def test_a_preset_is_what_its_paper_says(preset: str) -> None:
    words = ["--config", str(PRESETS / f"{preset}.yaml"), "--init_from", "x", "--prompts", "y"]
    config = parse_config(Config, words, program="minnow rl")
    algorithm, loss = config.algorithm, config.algorithm.loss
    assert PAPERS[preset] == (
        algorithm.advantage, loss.surrogate, loss.ratio, loss.aggregation, loss.clip_low, loss.clip_high, loss.kl_coef,
        algorithm.kl_reward_coef,
    )  # fmt: skip
    assert algorithm.drop_equal_groups == (preset == "dapo")
    assert (config.rewards.overlong, config.rewards.overlong_buffer) == ((1.0, 0.2) if preset == "dapo" else (0, 0))
    assert loss.dual_clip == (3.0 if preset == "ppo" else None)
    assert algorithm.updates_per_phase > 1  # else the ratio is always 1, and clipping says nothing (B3)
    algorithm.check_samples(config.rollout.samples)


@pytest.mark.parametrize(
    "wrong",
    [
        {"correction_cap": 0.0},  # weighed every token with 0: nothing was learnt, without a word
        {"max_redraws": -1},
        {"kl_reward_coef": -0.1},
        {"epochs": 0},
        {"minibatches": 0},
        {"tracker_answers": -1},
    ],
)
def test_settings_that_teach_nothing_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"algorithm.{next(iter(wrong))} is"):
        AlgorithmConfig(**wrong)


@pytest.mark.parametrize("wrong", [{"gamma": 1.1}, {"lam": -0.1}, {"value_clip": 0.0}, {"warmup_phases": -1}])
def test_a_critic_that_cannot_be(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"algorithm.critic.{next(iter(wrong))} is"):
        CriticConfig(**wrong)


def test_a_run_without_settings_gets_the_defaults_that_published_figures_were_measured_with() -> None:
    """The presets leave them alone, and so do the commands of the handbook."""
    assert vars(CriticConfig()) == {
        "init_from": None,
        "learning_rate": 1e-4,
        "gamma": 1.0,
        "lam": 0.95,
        "value_clip": 0.2,
        "warmup_phases": 4,
    }
    algorithm = AlgorithmConfig()
    assert (algorithm.correction_cap, algorithm.correction_level, algorithm.kl_reward_estimator) == (2.0, "token", "k1")
    assert algorithm.loss.kl_estimator == "k3"


def test_a_single_answer_has_no_group_to_be_dropped_with() -> None:
    """SPO with drop_equal_groups asked four rounds of prompts and threw three away, whatever they earned."""
    spo = AlgorithmConfig(advantage="tracker", drop_equal_groups=True)
    with pytest.raises(UserError, match="rollout.samples is 1, but algorithm.drop_equal_groups"):
        spo.check_samples(1)
    spo.check_samples(2)


def test_the_policy_that_plays_and_the_one_that_learns_drop_nothing() -> None:
    """The first ratio of a phase was not 1: GSPO's narrow clip took the gradient of half of the tokens."""
    words = ["--init_from", "x", "--prompts", "y", "--lora.rank", "4"]
    parse_config(Config, words, program="minnow rl")
    for wrong, sign in ((["--lora.dropout", "0.1"], "lora.dropout is 0.1"), (["--phases", "0"], "phases is 0")):
        with pytest.raises(UserError, match=sign):
            parse_config(Config, [*words, *wrong], program="minnow rl")
