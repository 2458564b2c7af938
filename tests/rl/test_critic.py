"""PPO's critic: one of its updates by hand, and the phases in which it alone learns."""

from __future__ import annotations

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from minnow.cli import PRESETS
from minnow.config import UserError, parse_config
from minnow.data.batches import Share
from minnow.model.attention import PackedAttention
from minnow.model.reward_model import RewardModel
from minnow.rl.algorithm import AlgorithmConfig, CriticConfig
from minnow.rl.critic import Critic
from minnow.rl.experience import pack_trajectories
from minnow.stages import rl
from minnow.training.loss_scale import LossScale
from minnow.training.session import Machine
from tests.rl.helpers import saved
from tests.rl.phase_helpers import phases, settings, stirred, trajectory

EPISODE = trajectory([5, 9, 13, 21, 7, 4, 30], wrote=4)
# (old value, return) less the value that the critic gives now. The first has moved 0.5 away from both, so that kept
# near the old value it is farther from the return; the second comes towards its return; the last two hardly moved.
OLD = [-0.5, -0.5, -0.1, 0.05]
RETURN = [0.4, -0.4, 0.7, -0.2]


def critic(**config: float | None) -> Critic:
    model = RewardModel.from_language_model(stirred())
    with torch.no_grad():
        model.score.weight.copy_(torch.linspace(-0.3, 0.4, 32)[None])
    return Critic(model, CriticConfig(**config))  # type: ignore[arg-type]


def states(it: Critic) -> torch.Tensor:
    """What the head reads of the episode's four trained tokens, [4, D] float64: the places before them."""
    tokens = torch.tensor(EPISODE.ids)[None, :-1]
    attention = PackedAttention(torch.tensor([0, 6], dtype=torch.int32))
    with torch.no_grad():
        return it.model(tokens, torch.arange(6)[None], attention)[0, 2:].double()


def update(it: Critic) -> tuple[float, np.ndarray]:
    """One update on the episode; the loss that it says, and the values before it."""
    packed = pack_trajectories([EPISODE], [0], 8, 1)
    (values,) = it.values(packed, 1)
    old, returns = ([values + np.array(less, np.float32)] for less in (OLD, RETURN))
    return it.update(packed, old, returns, tokens=4), values.astype(np.float64)


@pytest.mark.parametrize("clip", [0.2, None])
def test_an_update_by_hand(clip: float | None) -> None:
    it = critic(value_clip=clip, learning_rate=1e-3)
    hidden, head = states(it), it.model.score.weight.detach().double()[0].clone()
    loss, values = update(it)
    assert values == pytest.approx((hidden @ head).numpy(), abs=1e-5)

    by_hand, gradient = 0.0, torch.zeros(32, dtype=torch.float64)
    kept_back = 0
    for state, value, less_old, less_return in zip(hidden, values.tolist(), OLD, RETURN, strict=True):
        old, wanted = value + less_old, value + less_return
        error = (value - wanted) ** 2
        near = value if clip is None else min(max(value, old - clip), old + clip)
        if (near - wanted) ** 2 > error + 1e-9:  # the bound decides: the value itself has no gradient
            error, kept_back = (near - wanted) ** 2, kept_back + 1
        else:
            gradient += (value - wanted) * state / 4
        by_hand += 0.5 * error / 4
    assert kept_back == (0 if clip is None else 1)
    assert loss == pytest.approx(by_hand, abs=1e-6)
    # AdamW's first step goes by the sign: its two means are g and g^2, whatever the gradient was scaled by.
    moved = it.model.score.weight.detach().double()[0] - head
    clear = gradient.abs() > 1e-3
    assert int(clear.sum()) > 25
    assert moved[clear].numpy() == pytest.approx((-1e-3 * gradient.sign()[clear]).numpy(), rel=1e-2)


def test_a_gradient_is_cut_to_length_1_and_nothing_else_moves_a_weight() -> None:
    """AdamW's first mean is a tenth of the first gradient; of a token that is not read the embedding stays."""
    it = critic(value_clip=None)
    before = it.model.model.embed_tokens.weight.detach().clone()
    packed = pack_trajectories([EPISODE], [0], 8, 1)
    it.update(packed, [np.zeros(4, np.float32)], [np.full(4, 1e4, np.float32)], tokens=4)
    means = [it.optimizer.state[parameter]["exp_avg"] for parameter in it.model.parameters()]
    assert float(torch.nn.utils.get_total_norm(means)) == pytest.approx(0.1, rel=1e-3)
    unread = [token for token in range(len(before)) if token not in EPISODE.ids]
    assert torch.equal(it.model.model.embed_tokens.weight[unread], before[unread])


def test_the_critic_has_a_learning_rate_of_its_own() -> None:
    """One step from the same weights: thrice the rate goes thrice as far, the decoder and the head alike."""
    slow, fast = critic(learning_rate=1e-3), critic(learning_rate=3e-3)
    before = copy.deepcopy(slow.model.state_dict())
    assert update(slow)[0] == update(fast)[0]
    for name, weights in before.items():
        step, larger = (it.model.state_dict()[name] - weights for it in (slow, fast))
        assert float(step.abs().max()) == pytest.approx(1e-3, rel=0.05), name
        torch.testing.assert_close(larger, 3 * step, rtol=1e-2, atol=1e-6, msg=name)


def test_the_critic_learns_before_the_policy_does(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Every answer earns 1 and a fresh critic says 0: two phases of warm-up teach it, the policy stays."""
    policy, start = stirred(), stirred()
    config = CriticConfig(learning_rate=0.01, warmup_phases=2, lam=1.0)
    learner = Critic(RewardModel.from_language_model(copy.deepcopy(policy)), config)
    heads: list[torch.Tensor] = []

    def reward(number: int, place: int) -> float:
        if place == 0:  # once a phase, before anything is learnt from it
            heads.append(learner.model.score.weight.detach().clone())
        return 1.0

    algorithm = AlgorithmConfig(advantage="gae", critic=config)
    source, _ = phases(monkeypatch, tmp_path, settings(algorithm), reward, model=policy, critic=learner)
    source.micro_batches(0, Share())
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [-2, -1, 0]
    losses = [line["value_loss"] for line in lines]
    assert losses[0] == pytest.approx(0.5)  # 0.5 (0 - 1)^2 of every token
    assert all(abs(loss - 0.5) > 1e-3 for loss in losses[1:])  # it says something else by now
    assert len(heads) == 3
    assert not heads[0].any()
    assert heads[1].any()
    assert not torch.equal(heads[1], heads[2])
    kept = start.state_dict()
    assert all(torch.equal(tensor, kept[name]) for name, tensor in policy.state_dict().items())


def test_a_phase_s_value_loss_is_the_mean_of_its_updates(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    learner, said = critic(warmup_phases=0), iter([1.0, 3.0, 5.0, 9.0])
    monkeypatch.setattr(learner, "update", lambda *words: next(said))
    algorithm = AlgorithmConfig(advantage="gae", critic=learner.config, minibatches=2)
    source, _ = phases(monkeypatch, tmp_path, settings(algorithm), lambda number, place: float(place), critic=learner)
    for step in range(4):
        source.micro_batches(step, Share())
    lines = [json.loads(line) for line in (tmp_path / "rollouts.jsonl").read_text().splitlines()]
    assert [(line["updates"], line["value_loss"]) for line in lines] == [(0, 2.0), (2, 7.0)]


def test_the_critic_keeps_no_more_activations_than_the_policy(tmp_path: Path) -> None:
    """It kept all of them, whatever training.gradient_checkpointing said: it, and not the policy, filled the memory."""
    words = f"--config {PRESETS / 'ppo.yaml'} --init_from {saved(tmp_path / 'start')} --prompts x --training.device cpu"
    for mode in ("off", "full"):
        words_too = [*words.split(), "--training.gradient_checkpointing", mode]
        config = parse_config(rl.Config, words_too, program="minnow ppo")
        it = rl._critic(config, Machine.choose(config.training))
        assert it is not None
        assert it.model.gradient_checkpointing == mode
        update(it)


def test_in_fp16_small_gradients_do_not_vanish() -> None:
    """The loss had no scale: shared out over many tokens, its gradients were zeros below the head."""
    single, half = critic(), critic()
    half.model.compute_dtype = torch.float16
    half.loss_scale = LossScale(torch.float16)
    packed = pack_trajectories([EPISODE], [0], 8, 1)
    values = [np.zeros(4, np.float32)]
    for it in (single, half):
        it.update(packed, values, [np.full(4, 0.1, np.float32)], tokens=1_000_000)
    for (name, weight), other in zip(single.model.named_parameters(), half.model.parameters(), strict=True):
        expected, got = (it.optimizer.state[p]["exp_avg"] for it, p in ((single, weight), (half, other)))
        assert float((got - expected).norm()) < 0.05 * float(expected.norm()) + 1e-20, name


def test_an_update_that_overflows_is_left_out() -> None:
    it = critic()
    it.model.compute_dtype = torch.float16
    it.loss_scale = LossScale(torch.float16)
    it.loss_scale.scale = 2.0**40
    before = copy.deepcopy(it.model.state_dict())
    update(it)
    assert all(torch.equal(tensor, before[name]) for name, tensor in it.model.state_dict().items())
    assert not it.optimizer.state
    assert it.loss_scale.scale == 2.0**39
    again = critic()
    again.load_state_dict(it.state_dict())
    assert again.loss_scale.scale == 2.0**39


def test_a_gradient_that_is_not_a_number_ends_the_run_before_the_weights_change() -> None:
    """They all became NaN without a word; the policy said so a phase later."""
    it = critic()
    before = copy.deepcopy(it.model.state_dict())
    packed = pack_trajectories([EPISODE], [0], 8, 1)
    with pytest.raises(UserError, match="critic's gradient norm is nan"):
        it.update(packed, [np.zeros(4, np.float32)], [np.full(4, np.nan, np.float32)], tokens=4)
    assert all(torch.equal(tensor, before[name]) for name, tensor in it.model.state_dict().items())
