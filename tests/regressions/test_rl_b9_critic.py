"""B9: a critic that normed its states twice, cut-off answers that were worth nothing more, prompts that were cut."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.rl.helpers import saved, tiny, write_prompts
from tests.rl.phase_helpers import prompt, stirred, trajectory

from minnow.cli import main
from minnow.model.reward_model import RewardModel
from minnow.rl.advantages import PhaseScores, advantages_of
from minnow.rl.algorithm import AlgorithmConfig, CriticConfig
from minnow.rl.critic import Critic
from minnow.rl.environment import SingleTurn
from minnow.rl.experience import pack_trajectories
from minnow.rl.rollouts import RolloutConfig, live_engine, play
from minnow.tokenizer.chat import render


def test_the_critic_norms_its_states_once() -> None:
    critic = Critic(RewardModel.from_language_model(stirred()), CriticConfig())
    model = critic.model
    with torch.no_grad():
        model.model.norm.weight.copy_(torch.linspace(0.5, 3.0, 32))  # norming twice would show
        model.score.weight.copy_(torch.linspace(-1.0, 1.0, 32)[None])
    episode = trajectory([5, 9, 13, 21, 7, 4], wrote=3)
    before_norm: list[torch.Tensor] = []
    watching = model.model.norm.register_forward_pre_hook(lambda module, inputs: before_norm.append(inputs[0]))
    (values,) = critic.values(pack_trajectories([episode], [0], 6, 1), 1)
    watching.remove()
    (states,) = before_norm  # once
    scale = torch.rsqrt(states.square().mean(-1, keepdim=True) + model.config.rms_norm_eps)
    by_hand = (states * scale * model.model.norm.weight) @ model.score.weight[0]
    # What is written at places 3 to 5 is valued where it is predicted, at places 2 to 4.
    assert values == pytest.approx(by_hand[0, 2:5].detach().numpy(), abs=1e-5)


def test_a_cut_off_answer_goes_on_being_worth_what_the_critic_says() -> None:
    """Answers alike but for their end. gamma 1, lambda 1: a return is what is still to come."""
    values = [np.array([0.2, 0.6], np.float32)] * 3
    zeros = [np.zeros(2, np.float32)] * 3
    answers = [trajectory([5, 6, 7], 2, reward=0.1, ending=ending) for ending in ("stop", "length", "turns")]
    algorithm = AlgorithmConfig(advantage="gae", critic=CriticConfig(gamma=1.0, lam=1.0))
    _, returns = advantages_of(algorithm, answers, PhaseScores(zeros, None, zeros, values), None)
    assert returns[0] == pytest.approx([0.1, 0.1])
    assert returns[1] == pytest.approx([0.7, 0.7])  # 0.1 + 0.6, the last value
    assert returns[2] == pytest.approx([0.1, 0.1])  # a whole answer, if the last that there was a turn for


def test_a_prompt_is_read_whole_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, tokenizer = tiny()
    asked = prompt(7)
    (episode,) = play(
        live_engine(model, tokenizer), [SingleTurn(asked)], [0], RolloutConfig(max_tokens=4), seed=0, longest=64
    )
    whole = render(tokenizer, asked.conversation, add_generation_prompt=True).ids.tolist()
    assert episode.ids[: len(whole)] == whole  # header, question, and the assistant's own header
    (packed,) = pack_trajectories([episode], [0], 64, 1)
    assert packed.batch.tokens_BT[0, : len(whole)].tolist() == whole
    start, prompts = saved(tmp_path / "start"), write_prompts(tmp_path / "prompts.jsonl")
    words = ["ppo", "--init_from", str(start), "--prompts", str(prompts), "--run", str(tmp_path / "run")]
    assert main([*words, "--sequence_length", str(len(whole) + 3), "--rollout.max_tokens", "4"]) == 2
    assert "no prompt of the prompts is short enough" in capsys.readouterr().err
