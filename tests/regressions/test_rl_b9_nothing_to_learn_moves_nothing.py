"""B9: a step without anything to learn still stepped AdamW, whose momentum and decay moved the weights."""

from pathlib import Path

import torch
from tests.training.helpers import SHAPE, make_trainer

from minnow.data.batches import Batch
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig
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
