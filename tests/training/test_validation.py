"""Held-out figures that several processes make together."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from minnow.data.batches import Batch
from minnow.model.slices import examined
from minnow.model.transformer import CausalLM
from minnow.training.objective import LanguageModeling
from minnow.training.validation import ObjectiveValidation

from .helpers import SHAPE, masked_batch


class Looks(LanguageModeling):
    """Notes what is shown to it before a validation."""

    seen: list[Batch]

    def look_ahead(self, model: CausalLM, batches: Sequence[Batch]) -> None:
        object.__setattr__(self, "seen", list(batches))


@pytest.mark.parametrize(("processes", "batches"), [(1, 3), (2, 3), (3, 3), (3, 2), (3, 1)])
def test_every_batch_counts_alike_for_the_figure_of_the_whole(
    processes: int, batches: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two batches and three processes the second batch counted twice in kto's reference point."""
    held_out = [masked_batch(number) for number in range(batches)]
    model = CausalLM(SHAPE)
    whole = ObjectiveValidation(LanguageModeling(), held_out, torch.device("cpu"))(model)["validation_loss"]
    shown: list[int] = []
    shares: list[float] = []
    for rank in range(processes):
        monkeypatch.setattr("minnow.training.validation.rank", lambda rank=rank: rank)
        monkeypatch.setattr("minnow.training.validation.world_size", lambda: processes)
        objective = Looks()
        figures = ObjectiveValidation(objective, held_out, torch.device("cpu"))(model)
        shares.append(figures["validation_loss"])  # as far as this process alone made it
        assert objective.seen, "slices are gathered by all processes together"
        shown += [next(i for i, batch in enumerate(held_out) if batch is one) for one in objective.seen]
    assert len({shown.count(number) for number in range(batches)}) == 1
    assert sum(shares) == pytest.approx(whole)


def test_a_model_whose_examination_fails_is_back_in_the_mode_that_it_was_in() -> None:
    model = CausalLM(SHAPE).train()
    with pytest.raises(RuntimeError, match="lost"), examined(model):
        raise RuntimeError("lost")
    assert model.training
