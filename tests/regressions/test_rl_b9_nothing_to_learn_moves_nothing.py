"""B9: a step without anything to learn still stepped AdamW, whose momentum and decay moved the weights."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tests.rl.phase_helpers import settings, trajectory
from tests.training.helpers import SHAPE, make_trainer

from minnow.data.batches import Batch
from minnow.model.experts_config import ExpertsConfig
from minnow.model.transformer import CausalLM
from minnow.objectives.policy import PolicyLossConfig
from minnow.optim import OptimConfig
from minnow.rl.algorithm import AlgorithmConfig
from minnow.rl.experience import PolicyObjective
from minnow.rl.phase_experience import Experience, PhaseScores
from minnow.training.objective import LanguageModeling, ObjectiveOutput


class NothingToLearn(LanguageModeling):
    def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
        return ObjectiveOutput(super().__call__(model, batch).loss_sum * 0)


def test_weights_stay_where_all_advantages_are_zero(tmp_path: Path) -> None:
    model = CausalLM(SHAPE, seed=1)
    trainer = make_trainer(tmp_path, model=model, optim=OptimConfig(optimizer="adamw", weight_decay=0.1))
    trainer.train_step()  # momentum to lose
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    learn, trainer.objective = trainer.objective, NothingToLearn(z_loss=0)
    figures = trainer.train_step()
    assert figures["grad_norm"] == 0
    assert trainer.state.step == 2
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    trainer.objective = learn
    trainer.train_step()
    assert not all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("advantage", "kl_coef", "moves"), [(0.0, 0.0, False), (0.0, 0.1, True), (1.0, 0.0, True)])
def test_a_mixture_is_not_moved_by_its_balance_loss_alone(
    tmp_path: Path, advantage: float, kl_coef: float, moves: bool
) -> None:
    """That loss always has a gradient, of which AdamW makes steps as large as any."""
    experts = ExpertsConfig(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    model = CausalLM(replace(SHAPE, experts=experts), seed=1)
    answers = [trajectory(range(number, number + 9), 4) for number in range(4)]
    values = [np.full(4, advantage, np.float32)] * 4
    zeros = [np.zeros(4, np.float32)] * 4
    scores = PhaseScores(old=zeros, ref=zeros if kl_coef else None, penalties=zeros, advantages=values)
    loss = PolicyLossConfig(kl_coef=kl_coef)
    batches = Experience(answers, range(4), scores).minibatch(
        settings(AlgorithmConfig(loss=loss)), range(4), make_trainer(tmp_path).share
    )
    source = SimpleNamespace(micro_batches=lambda step, share: batches)
    trainer = make_trainer(tmp_path, model=model, source=source, optim=OptimConfig(optimizer="adamw"))  # type: ignore[arg-type]
    trainer.objective = PolicyObjective(loss, temperature=1.0)  # type: ignore[assignment]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    figures = trainer.train_step()
    assert figures["advantage_share"] == (advantage != 0)
    stayed = all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert stayed != moves
