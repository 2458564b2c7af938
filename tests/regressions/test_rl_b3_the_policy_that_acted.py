"""B3: answers were drawn at one temperature and scored at another, so that the ratio was against a policy that never
acted. Rollouts, scores and updates are all of the policy at the rollouts' temperature; where top-p cuts its tail off,
what the sampler says is what was drawn from, and the scores stay those of the whole policy.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from tests.rl.helpers import saved, write_prompts

from minnow.cli import main
from minnow.data.batches import Share
from minnow.model.attention import PackedAttention
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.rl.advantages import PhaseScores
from minnow.rl.phase_scores import PhaseScorer
from minnow.rl.rollouts import Trajectory
from minnow.tokenizer import Tokenizer

TEMPERATURE = 0.7


def start(folder: Path) -> Path:
    """A model that is surer of what it says than a new one: temperature and top-p make a difference to it."""
    saved(folder)
    model, tokenizer = load_pretrained(folder), Tokenizer.from_pretrained(folder)
    with torch.no_grad():
        model.head_weight.mul_(3)
    save_pretrained(model, folder, tokenizer=tokenizer)
    return folder


def distributions(model: CausalLM, episode: Trajectory) -> tuple[np.ndarray, np.ndarray]:
    """The policy at the rollouts' temperature before each token that it wrote, [N, V] in float64, and those tokens."""
    ids, n = torch.tensor(episode.ids), len(episode.ids) - 1
    with torch.no_grad():
        hidden = model(ids[None, :-1], torch.arange(n)[None], PackedAttention(torch.tensor([0, n], dtype=torch.int32)))
        logits = hidden[0].double() @ model.head_weight.double().T / TEMPERATURE
    own = torch.tensor(episode.trained[1:])
    return torch.softmax(logits, -1)[own].numpy(), ids[1:][own].numpy()


def kept_mass(policy: np.ndarray, top_p: float) -> list[float]:
    """What the fewest likeliest tokens that hold `top_p` hold together; two answers where rounding may decide."""
    upto = np.sort(policy)[::-1].cumsum()
    return [float(upto[upto >= min(top_p + rounding, upto[-1])][0]) for rounding in (-1e-6, 1e-6)]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_a_run_at_a_temperature_is_of_the_policy_that_acted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, top_p: float
) -> None:
    original = PhaseScorer.score
    masses: list[list[float]] = []  # of each phase

    def score(self: PhaseScorer, episodes: Sequence[Trajectory], prompts: np.ndarray, share: Share) -> PhaseScores:
        """As it is, and every token of the phase by hand."""
        scores = original(self, episodes, prompts, share)
        masses.append([])
        for episode, old in zip(episodes, scores.old, strict=True):
            policies, tokens = distributions(self.policy, episode)
            for policy, token, mine, sampled in zip(policies, tokens, old, episode.sampler_logprobs, strict=True):
                assert mine == pytest.approx(math.log(policy[token]), abs=1e-4)  # the whole policy, its tail included
                mass = min(kept_mass(policy, top_p), key=lambda mass: abs(mass - policy[token] / math.exp(sampled)))
                assert sampled == pytest.approx(math.log(policy[token] / mass), abs=1e-4)  # what was drawn from
                assert policy[policy > policy[token]].sum() < top_p + 1e-6
                masses[-1].append(mass)
        return scores

    monkeypatch.setattr(PhaseScorer, "score", score)
    settings = {
        "init_from": start(tmp_path / "start"), "prompts": write_prompts(tmp_path / "prompts.jsonl"),
        "run": tmp_path / "run", "phases": 3, "rollout.prompts": 4, "rollout.samples": 4, "rollout.max_tokens": 6,
        "rollout.temperature": TEMPERATURE, "rollout.top_p": top_p, "algorithm.minibatches": 2, "sequence_length": 64,
        "rewards.answer": 0, "rewards.functions": "tests.rl.helpers:any_reward", "optim.matrix_lr": 0.02,
        "training.device": "cpu", "training.precision": "fp32", "training.micro_batch_tokens": 128,
        "training.save_every": 0, "watch.patience": 0,
    }  # fmt: skip
    assert main(["grpo", *(word for key, value in settings.items() for word in (f"--{key}", str(value)))]) == 0

    # The updates: at the first of every phase the ratio is 1, at the second the policy has moved.
    updates = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    moved = [update["kl_old"] for update in updates if "kl_old" in update]
    assert len(moved) == 6
    assert max(abs(kl) for kl in moved[::2]) < 1e-9
    assert min(moved[1::2]) > 1e-5
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run/model"))
    assert any(not torch.equal(before[name], after[name]) for name in before)

    phases = [json.loads(line) for line in (tmp_path / "run" / "rollouts.jsonl").read_text().splitlines()]
    assert len(phases) == len(masses) == 3
    assert phases[0]["kl_to_reference"] == 0  # the reference is read at the same temperature
    assert phases[2]["kl_to_reference"] != 0
    for phase, held in zip(phases, masses, strict=True):
        beside = [-math.log(mass) for mass in held]  # log pi_sampler - log pi: the sampler is surer of what it keeps
        assert phase["sampler_mismatch"] == pytest.approx(np.mean(beside), abs=1e-5)
        assert phase["sampler_mismatch_max"] == pytest.approx(max(beside), abs=1e-4)
        if top_p == 1:
            assert phase["sampler_mismatch_max"] < 1e-4
        else:
            assert 0.01 < phase["sampler_mismatch"] < phase["sampler_mismatch_max"] < -math.log(top_p) + 1e-4
