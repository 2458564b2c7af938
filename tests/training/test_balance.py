"""Balanced experts in the training loop: any cut of the batch gives the same updates, a resumed run the same bits."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from minnow.data.batches import Batch, Share
from minnow.model.experts_config import ExpertsConfig
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.transformer import CausalLM
from minnow.objectives.balance import expert_counts, load_balance_loss
from minnow.optim import OptimConfig, ScheduleConfig, build_optimizers
from minnow.training.balance import BalanceConfig
from minnow.training.config import TrainingConfig
from minnow.training.loss_scale import LossScale
from minnow.training.objective import LanguageModeling, ObjectiveOutput
from minnow.training.trainer import Trainer
from tests.without_float64 import WithoutFloat64

from .helpers import SHAPE, masked_batch, rows_of
from .helpers import make_trainer as trainer_of

FAMILIES = {
    "softmax": ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
    "one": ExpertsConfig(num_experts=4, num_experts_per_tok=1, moe_intermediate_size=16),
    "sigmoid": ExpertsConfig(
        num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, scoring="sigmoid", n_shared_experts=1,
        first_k_dense_replace=1,
    ),
    "noisy": ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, noisy=True),
}  # fmt: skip
# Strong enough to matter in a few updates.
STRONG = BalanceConfig(load_loss=1.0, kl_loss=1.0, sequence_loss=1.0, bias_rate=0.05)


def batch_with_filler(step: int, rows: int = 8) -> Batch:
    """Rows of 32 places of which the last 3 * row hold nothing: an uneven share of filler."""
    batch = masked_batch(step, rows)
    filler_BT = torch.arange(32) >= 32 - 3 * torch.arange(rows)[:, None]
    borders = sorted({32 * row for row in range(rows + 1)} | {32 * (row + 1) - 3 * row for row in range(rows)})
    weights_BT = batch.weights_BT.masked_fill(filler_BT, 0.0)
    weights_BT[:, 0] = 1.0
    positions_BT = torch.where(filler_BT, torch.arange(32) - (32 - 3 * torch.arange(rows)[:, None]), batch.positions_BT)
    return replace(
        batch,
        filler_BT=filler_BT,
        weights_BT=weights_BT,
        positions_BT=positions_BT,
        cu_seqlens=torch.tensor(borders, dtype=torch.int32),
    )


class Source:
    """A pure function of the step; the global batch is cut at the given rows."""

    def __init__(self, *cuts: int) -> None:
        self.borders = [0, *cuts, 8]

    def micro_batches(self, step: int, share: Share) -> list[Batch]:
        batch = batch_with_filler(step)
        return [part(batch, *pair) for pair in zip(self.borders, self.borders[1:], strict=False)]


def part(batch: Batch, start: int, stop: int) -> Batch:
    inside = batch.cu_seqlens[(batch.cu_seqlens >= 32 * start) & (batch.cu_seqlens <= 32 * stop)] - 32 * start
    return replace(rows_of(batch, start, stop), cu_seqlens=inside)


def make_trainer(
    folder: Path, family: str, *cuts: int, balance: BalanceConfig = STRONG, lr: float = 0.004, **settings
) -> Trainer:
    model = CausalLM(replace(SHAPE, experts=FAMILIES[family]), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("experts.down_proj", "down_proj.weight", "noise_weight")):
                parameter.normal_(0.0, 0.3, generator=generator)  # so that the router has a gradient from the start
    return Trainer(
        TrainingConfig(balance=balance, **({"validate_every": 0, "save_every": 2, "seed": 1} | settings)),
        folder=folder,
        title="test",
        model=model,
        optimizers=build_optimizers(model, OptimConfig(optimizer="adamw", matrix_lr=lr), tokens_per_batch=512),
        schedule=ScheduleConfig(shape="constant", warmup_steps=0),
        objective=LanguageModeling(z_loss=1e-4),
        source=Source(*cuts),
        total_steps=6,
    )


def gradients(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Of the next update; the optimizers are kept from taking it."""
    found: dict[str, torch.Tensor] = {}

    def keep() -> None:
        found.update({name: p.grad.clone() for name, p in trainer.model.named_parameters() if p.grad is not None})

    optimizers, trainer.optimizers[0].step = trainer.optimizers, keep
    trainer.train_step()
    del optimizers[0].step
    return found


@pytest.mark.parametrize(
    ("family", "loads"), [*((family, "last_batch") for family in sorted(FAMILIES)), ("noisy", "same_batch")]
)
def test_any_cut_of_the_batch_gives_the_same_gradients(tmp_path: Path, family: str, loads: str) -> None:
    """1 x 8 rows, 2 x 4, 8 x 1 and an uneven cut: figures, gradients, biases and statistics after two updates."""
    balance = replace(STRONG, loads=loads)
    whole = make_trainer(tmp_path / "whole", family, balance=balance)
    expected_figures = [whole.train_step() for _ in range(2)]
    expected = gradients(whole)
    for number, cuts in enumerate([(4,), range(1, 8), (3, 7)]):
        cut = make_trainer(tmp_path / str(number), family, *cuts, balance=balance)
        for wanted in expected_figures:
            figures = cut.train_step()
            for name in ("loss", "balance_loss", "router_entropy", "expert_load_max", "expert_load_min", "grad_norm"):
                assert figures[name] == pytest.approx(wanted[name], rel=1e-4), name
        got = gradients(cut)
        for name, gradient in expected.items():
            torch.testing.assert_close(
                got[name], gradient, rtol=1e-3, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}"
            )
        for mine, theirs in zip(cut.model.buffers(), whole.model.buffers(), strict=True):
            assert torch.equal(mine, theirs)


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("family", ["softmax", "sigmoid", "noisy"])
def test_gradient_checkpointing_changes_no_gradient(tmp_path: Path, family: str, mode: str) -> None:
    """A layer that is run again in the backward pass leaves out the same filler, and has the same noise."""
    plain, checkpointed = make_trainer(tmp_path / "a", family, 4), make_trainer(tmp_path / "b", family, 4)
    checkpointed.model.gradient_checkpointing = mode
    expected, got = gradients(plain), gradients(checkpointed)
    assert got.keys() == expected.keys()
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_no_float64_is_asked_of_the_device(tmp_path: Path) -> None:
    """Apple's GPUs have none: a mixture could not be trained on one."""
    plain, without = make_trainer(tmp_path / "a", "sigmoid", 4), make_trainer(tmp_path / "b", "sigmoid", 4)
    expected = plain.train_step()
    with WithoutFloat64():
        assert without.train_step() == expected


def test_the_balance_losses_are_in_the_gradient(tmp_path: Path) -> None:
    """Without them the same update is another one: the test above compares something."""
    none = BalanceConfig(load_loss=0.0, kl_loss=0.0, sequence_loss=0.0, bias_rate=0.0)
    for family in ("softmax", "noisy"):
        with_losses, without = make_trainer(tmp_path / "a", family), make_trainer(tmp_path / "b", family, balance=none)
        for trainer in (with_losses, without):
            trainer.train_step()
        name = "model.layers.1.mlp.gate.weight"
        difference = gradients(with_losses)[name] - gradients(without)[name]
        assert difference.abs().max() > 1e-3


@pytest.mark.parametrize("loads", ["last_batch", "same_batch"])
def test_the_gradient_is_that_of_the_loss(tmp_path: Path, loads: str) -> None:
    """E sum_e f_e P_e of each layer, P over the real tokens of the batch, f of the batch before or of the same."""
    balance = BalanceConfig(load_loss=1.0, kl_loss=0.0, sequence_loss=0.0, loads=loads)
    trainer = make_trainer(tmp_path / "a", "softmax", 3, balance=balance, clip_norm=0.0)
    plain = make_trainer(tmp_path / "b", "softmax", 3, balance=replace(balance, load_loss=0.0), clip_norm=0.0)
    trainer.train_step()
    counts = torch.tensor(trainer.balance.state_dict()["counts"])
    plain.model.load_state_dict(trainer.model.state_dict())
    plain.state.step = 1
    batch = batch_with_filler(1)
    with trainer.balance.watch(batch, step=1, first_row=0) as routing:
        trainer.objective(trainer.model, batch)
    if loads == "same_batch":
        counts = torch.stack([expert_counts(decisions.experts_Nk, 4) for _, decisions in routing.decisions])
    loss = sum(
        load_balance_loss(counts[layer], decisions.probabilities_NE.sum(0)) for layer, decisions in routing.decisions
    )
    name = "model.layers.0.mlp.gate.weight"
    expected = torch.autograd.grad(loss, dict(trainer.model.named_parameters())[name])[0]
    got = gradients(trainer)[name] - gradients(plain)[name]
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-5)


def test_an_expert_without_any_probability_spoils_no_gradient_but_the_kl_losses(tmp_path: Path) -> None:
    """0 x infinity is not a number: so was every gradient, without a KL loss too."""
    trainer = make_trainer(tmp_path, "softmax", balance=replace(STRONG, kl_loss=0.0))
    trainer.balance._probability_sums_LE[:, 0] = 0.0  # of a softmax that has underflown
    assert math.isfinite(trainer.train_step()["grad_norm"])


def test_biases_stay_where_there_is_nothing_to_learn(tmp_path: Path) -> None:
    """As the weights do (bug B9): they are part of the model that is saved."""

    class NothingToLearn(LanguageModeling):
        def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
            return ObjectiveOutput(super().__call__(model, batch).loss_sum * 0)

    trainer = make_trainer(tmp_path, "sigmoid", balance=BalanceConfig(sequence_loss=0.0))
    trainer.train_step()
    before = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    trainer.objective = NothingToLearn()
    assert trainer.train_step()["grad_norm"] == 0
    assert all(torch.equal(tensor, before[name]) for name, tensor in trainer.model.state_dict().items())


@pytest.mark.parametrize("family", ["noisy", "sigmoid"])
def test_resume_is_bitwise(tmp_path: Path, family: str) -> None:
    """Biases, statistics and the weights of the noise are in the checkpoint."""
    uninterrupted = make_trainer(tmp_path / "a", family, 4)
    uninterrupted.fit()
    first = make_trainer(tmp_path / "b", family, 4)
    for _ in range(4):
        first.train_step()
    first._save()
    first.writer.wait()  # written by a thread
    second = make_trainer(tmp_path / "b", family, 4)
    assert second.resume()
    second.fit()
    for name, tensor in uninterrupted.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_sequence_loss_and_statistics_leave_filler_out(tmp_path: Path) -> None:
    """What filler holds changes nothing at all."""
    trainers = [make_trainer(tmp_path / name, "sigmoid", 4) for name in "ab"]
    plain = trainers[1].source.micro_batches

    def other_filler(step: int, share: Share) -> list[Batch]:
        batches = plain(step, share)
        return [replace(b, tokens_BT=torch.where(b.filler_BT, 63 - b.tokens_BT, b.tokens_BT)) for b in batches]

    trainers[1].source.micro_batches = other_filler  # type: ignore[method-assign]
    for _ in range(2):
        first, second = (trainer.train_step() for trainer in trainers)
        assert first == second
    for left, right in zip(*(trainer.model.parameters() for trainer in trainers), strict=True):
        assert torch.equal(left, right)


def test_two_documents_of_a_row_have_the_sequence_loss_that_they_have_alone(tmp_path: Path) -> None:
    only = BalanceConfig(load_loss=0.0, kl_loss=0.0, sequence_loss=1.0, bias_rate=0.0)
    trainer = make_trainer(tmp_path, "sigmoid", balance=only)
    wide = masked_batch(3, rows=4)
    tensors = {name: getattr(wide, name).view(8, 16) for name in ("tokens_BT", "targets_BT", "weights_BT", "filler_BT")}
    positions = torch.arange(16).expand(8, 16)
    borders = torch.arange(0, 129, 16, dtype=torch.int32)
    narrow = replace(wide, **tensors, positions_BT=positions, cu_seqlens=borders)
    packed = replace(wide, positions_BT=positions.reshape(4, 32), cu_seqlens=borders)
    losses = []
    for batch in (narrow, packed):
        with torch.no_grad(), trainer.balance.watch(batch, step=0, first_row=0) as routing:
            trainer.objective(trainer.model, batch)
        losses.append(float(trainer.balance.loss_sum(routing, batch)))
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("family", ["softmax", "sigmoid"])
def test_a_lopsided_router_becomes_even(tmp_path: Path, family: str) -> None:
    """Nearly all tokens go to two of four experts at first; without balancing they still do at the end."""
    none = BalanceConfig(load_loss=0.0, kl_loss=0.0, sequence_loss=0.0, bias_rate=0.0)
    balance = BalanceConfig(load_loss=0.05, bias_rate=0.01) if family == "softmax" else BalanceConfig(bias_rate=0.01)
    last = {}
    for name, chosen in (("balanced", balance), ("left alone", none)):
        trainer = make_trainer(tmp_path / name, family, balance=chosen, lr=0.0005)
        with torch.no_grad():
            trainer.model.model.embed_tokens.weight.add_(0.02)  # a direction that all tokens share, ...
            for router in trainer.balance.routers.values():
                router.weight[:2] += 0.05  # ... and two experts that ask for it
        loads = [trainer.train_step()["expert_load_max"] for _ in range(32)]
        assert loads[0] > 1.8
        last[name] = sum(loads[-6:]) / 6
    assert last["balanced"] < 1.4, last
    assert last["left alone"] > last["balanced"] + 0.2, last


@pytest.mark.parametrize("family", ["one", "softmax"])
def test_metrics_tell_the_load(tmp_path: Path, family: str) -> None:
    trainer = make_trainer(tmp_path, family, 4)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["dropped_share"] == 0.0
        assert 1.0 <= line["expert_load_max"] <= 4.0
        assert 0.0 <= line["expert_load_min"] <= 1.0
        assert 0.0 < line["router_entropy"] <= 1.3864  # ln 4
        assert 0.9 < line["balance_loss"] <= 4.0


def test_the_figures_of_a_step_are_means_over_layers(tmp_path: Path) -> None:
    """From what the routers decide about its batch, token by token and expert by expert."""
    trainer = make_trainer(tmp_path, "softmax", 4)
    batch = batch_with_filler(0)
    with torch.no_grad(), trainer.balance.watch(batch, step=0, first_row=0) as routing:
        trainer.objective(trainer.model, batch)
    expected = {"balance_loss": 0.0, "expert_load_max": 0.0, "expert_load_min": 0.0, "router_entropy": 0.0}
    for _, (probabilities, experts) in routing.decisions:
        shares = torch.bincount(experts.flatten(), minlength=4) / experts.numel()
        expected["balance_loss"] += 4 * float((shares * probabilities.mean(0)).sum()) / 2
        expected["expert_load_max"] += 4 * float(shares.max()) / 2
        expected["expert_load_min"] += 4 * float(shares.min()) / 2
        expected["router_entropy"] -= float((probabilities * probabilities.log()).sum(1).mean()) / 2
    assert len(routing.decisions) == 2
    figures = trainer.train_step()
    assert {name: figures[name] for name in expected} == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("family", "expected"),
    [("softmax", (0.01, 0.0, 0.0)), ("noisy", (0.0, 0.05, 0.0)), ("sigmoid", (0.0, 0.0, 0.0001))],
)
def test_each_family_is_balanced_in_its_own_way_by_default(tmp_path: Path, family: str, expected: tuple) -> None:
    balance = make_trainer(tmp_path, family, balance=BalanceConfig()).balance
    assert (balance.load_loss, balance.kl_loss, balance.sequence_loss) == expected


def test_beside_a_frozen_model_nothing_is_balanced(tmp_path: Path) -> None:
    """An adapter is saved without its base, whose selection biases must stay what they are."""
    model = CausalLM(replace(SHAPE, experts=FAMILIES["sigmoid"]), seed=1)
    add_lora(model, LoraConfig(rank=2), base="")
    before = [bias.clone() for bias in model.buffers()]
    figures = trainer_of(tmp_path, model=model).train_step()
    assert before
    assert all(map(torch.equal, model.buffers(), before))
    assert "balance_loss" not in figures


def test_noise_is_drawn_anew_for_every_step_layer_and_row(tmp_path: Path) -> None:
    """Noise that stayed the same would be a part of the router's weights."""
    balance = make_trainer(tmp_path, "noisy").balance

    def drawn(*, step: int = 3, first_row: int = 4, layer: int = 0) -> torch.Tensor:
        with balance.watch(batch_with_filler(0, 2), step=step, first_row=first_row) as routing:
            return routing.noise(layer)

    noise = drawn()
    assert torch.equal(drawn(), noise)
    assert torch.equal(drawn(first_row=5)[0], noise[1]), "a row has its noise wherever the batch is cut"
    for other in (drawn(step=4), drawn(layer=1), noise.flip(0)):
        assert not (other == noise).any()
    with pytest.raises(RuntimeError, match="lost"), balance.watch(batch_with_filler(0, 2), step=3, first_row=4):
        raise RuntimeError("lost")
    assert balance.model.routing is None, "what is held out, and not watched, is read without noise"


def test_an_update_that_overflows_moves_neither_biases_nor_statistics(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, "sigmoid")
    trainer.train_step()
    kept = trainer.balance.state_dict(), [bias.clone() for bias in trainer.model.buffers()]
    assert any(bias.any() for bias in kept[1])
    trainer.loss_scale = LossScale(torch.float16)
    trainer.loss_scale.scale = 2.0**140  # beyond fp32: every gradient overflows
    trainer.train_step()
    assert trainer.balance.state_dict() == kept[0]
    assert all(map(torch.equal, trainer.model.buffers(), kept[1]))
