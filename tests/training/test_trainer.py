"""The loop: normalisation, resume, early stopping, the NaN guard, checkpoints."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter

from minnow.config import UserError
from minnow.data.batches import Batch, Share
from minnow.model.transformer import CausalLM
from minnow.optim import newton_schulz
from minnow.training.checkpoint import list_checkpoints
from minnow.training.loss_scale import LossScale
from minnow.training.objective import LanguageModeling, ObjectiveOutput, PackedBatches, SourceStopsError, totals
from minnow.training.probe import random_batch
from minnow.training.trainer import NonFiniteLossError, Trainer

from .helpers import SHAPE, RandomSource, make_trainer, started_by

VOLATILE = {"tokens_per_second", "mfu", "memory_gb", "eta_seconds", "seconds"}


def metrics(trainer: Trainer) -> list[dict]:
    return [{k: v for k, v in record.items() if k not in VOLATILE} for record in trainer.metrics.read()]


def weights(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def assert_equal_weights(left: Trainer, right: Trainer) -> None:
    for name, weight in weights(left).items():
        assert torch.equal(weight, weights(right)[name]), name


@pytest.mark.parametrize("pieces", [2, 4, 8])
def test_cutting_the_batch_into_micro_batches_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, pieces: int
) -> None:
    monkeypatch.setattr(newton_schulz, "cpu_multiplies_bf16_faster", lambda: False)  # in bf16 Muon's error is larger
    whole = make_trainer(tmp_path / "whole", steps=3)
    cut = make_trainer(tmp_path / "cut", steps=3, source=RandomSource(pieces))
    for _ in range(3):
        expected, got = whole.train_step(), cut.train_step()
        assert got["loss"] == pytest.approx(expected["loss"], rel=1e-5)
        assert got["grad_norm"] == pytest.approx(expected["grad_norm"], rel=1e-4)
    # Muon orthogonalises: rounding of the sum is blown up in directions without gradient, hence not 1e-7.
    for name, weight in weights(whole).items():
        torch.testing.assert_close(weights(cut)[name], weight, rtol=0, atol=1e-4)


def test_the_loss_is_the_sum_over_all_tokens_by_their_count(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, source=RandomSource(4), z_loss=0.0)
    batches = trainer.source.micro_batches(0, Share())
    with torch.no_grad():
        outputs = [trainer.objective(trainer.model, batch) for batch in batches]
    total = sum(float(output.loss_sum) for output in outputs)
    count = sum(float(batch.weights_BT.sum()) for batch in batches)
    per_micro_batch = [float(o.loss_sum) / float(b.weights_BT.sum()) for o, b in zip(outputs, batches, strict=True)]
    assert trainer.train_step()["loss"] == pytest.approx(total / count, rel=1e-6)
    assert abs(total / count - sum(per_micro_batch) / 4) > 1e-5, (
        "the masks must be uneven for this test to see a difference"
    )


def test_an_objective_that_looks_ahead_sees_the_whole_batch_before_any_of_it_is_learnt(tmp_path: Path) -> None:
    """As KTO's does, whose reference point is of the batch: without a look it would be 0, or the last validation's."""
    events: list[int] = []

    class Looking(LanguageModeling):
        def look_ahead(self, model: CausalLM, batches: Sequence[Batch]) -> None:
            events.append(len(batches))

        def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
            events.append(0)
            return super().__call__(model, batch)

    trainer = make_trainer(tmp_path, source=RandomSource(4))
    trainer.objective = Looking()
    for _ in range(2):
        trainer.train_step()
    assert events == [4, 0, 0, 0, 0] * 2


@pytest.mark.parametrize("stop_after", [1, 3, 4, 7, 8, 11])
def test_resume_is_bitwise(tmp_path: Path, stop_after: int) -> None:
    uninterrupted = make_trainer(tmp_path / "a")
    uninterrupted.fit()
    first = make_trainer(tmp_path / "b")
    first.source = StopAt(stop_after)
    with pytest.raises(KeyboardInterrupt):
        first.fit()
    second = make_trainer(tmp_path / "b")
    assert second.resume() == (stop_after >= 3)
    second.fit()
    assert_equal_weights(uninterrupted, second)
    assert metrics(uninterrupted) == metrics(second)


class StopAt(RandomSource):
    """Dies when the batch of a step is asked for."""

    def __init__(self, step: int) -> None:
        super().__init__()
        self.step = step

    def micro_batches(self, step: int, share: Share) -> list:
        if step == self.step:
            raise KeyboardInterrupt
        return super().micro_batches(step, share)


def test_a_named_checkpoint_is_where_the_first_start_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Started again by torchrun, the same words went back to it once more, and deleted what had been trained since."""
    trainer = make_trainer(tmp_path, steps=9, keep_last=9)
    trainer.fit()
    steps = [checkpoint.step for checkpoint in list_checkpoints(trainer.checkpoints)]
    assert steps[-1] == 9
    started_by(monkeypatch, "a", 1)
    again = make_trainer(tmp_path, steps=9, keep_last=9, resume=3)
    again.resume()
    assert again.state.step == 3, "the first start died before it came here"
    again.fit()
    again.resume()
    assert again.state.step == 9
    assert [checkpoint.step for checkpoint in list_checkpoints(trainer.checkpoints)] == steps
    started_by(monkeypatch, "b", 0)
    again.resume()
    assert again.state.step == 3


def test_what_a_source_remembers_is_read_onto_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """PPO's critic was saved from the first process's GPU, and every process then read it onto that one."""

    class Remembers(RandomSource):
        def state_dict(self) -> dict[str, object]:
            return {"weight": torch.ones(3)}

        def load_state_dict(self, state: dict[str, object]) -> None:
            self.loaded = state["weight"]

    monkeypatch.setattr("torch.serialization.location_tag", lambda storage: "cuda:0")
    make_trainer(tmp_path, steps=3, source=Remembers()).fit()
    source = Remembers()
    make_trainer(tmp_path, steps=3, source=source).resume()
    assert torch.equal(source.loaded, torch.ones(3))


def test_the_loss_scale_is_resumed(tmp_path: Path) -> None:
    first, second = (make_trainer(tmp_path) for _ in range(2))
    for trainer in (first, second):
        trainer.loss_scale = LossScale(torch.float16)
    first.loss_scale.scale, first.loss_scale.calm_steps = 4.0, 7
    first._save()
    first.writer.wait()
    assert second.resume()
    assert (second.loss_scale.scale, second.loss_scale.calm_steps) == (4.0, 7)


def test_metrics_have_physical_units(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=4)
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    training = [line for line in lines if "loss" in line]
    assert [line["step"] for line in training] == [1, 2, 3, 4]
    for line in training:
        assert line["tokens"] == line["step"] * 8 * 32
        assert line["tokens_per_second"] > 0
        assert 0 < line["mfu"] < 1
        assert line["lr"] > 0
        assert line["memory_gb"] > 0.01
    (validation,) = [line for line in lines if "validation_loss" in line]
    assert validation["step"] == 4
    assert math.isfinite(validation["bits_per_byte"])


class Unsupervised(RandomSource):
    """From the second step on no token has a weight."""

    def micro_batches(self, step: int, share: Share) -> list:
        batches = super().micro_batches(step, share)
        return [replace(batch, weights_BT=batch.weights_BT * (step < 1)) for batch in batches]


def test_a_batch_without_anything_to_learn_is_told_with_its_step(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, source=Unsupervised(2))
    trainer.train_step()
    with pytest.raises(UserError, match="step 1: nothing in the batch is supervised"):
        trainer.train_step()


class PoisonSource(RandomSource):
    """Makes one weight of the batch infinite."""

    def micro_batches(self, step: int, share: Share) -> list:
        batches = super().micro_batches(step, share)
        if step == 2:
            batches[0].weights_BT[0, 0] = math.inf
        return batches


@pytest.mark.parametrize("pieces", [1, 4])
def test_nan_guard_names_step_and_documents_and_spares_the_weights(tmp_path: Path, pieces: int) -> None:
    trainer = make_trainer(tmp_path, source=PoisonSource(pieces))
    trainer.train_step()
    trainer.train_step()
    before = weights(trainer)
    with pytest.raises(NonFiniteLossError, match=r"step 2: loss is (inf|nan).*8 documents.*0, 1, 2, 3"):
        trainer.train_step()
    for name, weight in before.items():
        assert torch.equal(weight, dict(trainer.model.named_parameters())[name])


def test_a_gradient_that_is_not_finite_spares_the_weights_too(tmp_path: Path) -> None:
    """Of a loss that is."""
    trainer = make_trainer(tmp_path)
    trainer.train_step()
    before = weights(trainer)
    trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(NonFiniteLossError, match=r"step 1: gradient norm is (inf|nan).*8 documents.*0, 1, 2, 3"):
        trainer.train_step()
    for name, weight in before.items():
        assert torch.equal(weight, dict(trainer.model.named_parameters())[name])


def test_infinities_of_both_signs_add_up_to_no_error() -> None:
    """As the margins of two micro-batches of pairs may be: the sum raised, and nobody was told step and documents."""
    outputs = [ObjectiveOutput(torch.tensor(1.0), {"margin": torch.tensor(sign * math.inf)}) for sign in (1, -1)]
    found = totals(outputs)
    assert found["loss"] == 2.0
    assert math.isnan(found["margin"])


@pytest.mark.parametrize("clip_norm", [0.01, 0.0])
def test_clipping(tmp_path: Path, clip_norm: float) -> None:
    trainer = make_trainer(tmp_path, clip_norm=clip_norm)
    trainer.source.micro_batches(0, Share())
    for batch in trainer.source.micro_batches(0, Share()):
        (trainer.objective(trainer.model, batch).loss_sum / trainer.objective.count(batch)).backward()
    grads = [p.grad for p in trainer.parameters if p.grad is not None]
    norm = trainer._clip_gradients(grads, torch.nn.utils.get_total_norm(grads))
    after = torch.nn.utils.get_total_norm([p.grad for p in trainer.parameters if p.grad is not None])
    assert norm > 0.01
    assert float(after) == pytest.approx(clip_norm or norm, rel=1e-3)  # 0 switches it off


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(("clip_norm", "kept"), [(0.0, 1.0), (1.0, 1.0), (0.1, 0.2)])
def test_clipping_only_shortens_and_takes_the_loss_scale_out(
    tmp_path: Path, dtype: torch.dtype, clip_norm: float, kept: float
) -> None:
    """Of length 1/2. Losses show no difference: neither Muon nor AdamW asks how long a gradient is."""
    trainer = make_trainer(tmp_path, clip_norm=clip_norm)
    trainer.loss_scale = LossScale(dtype)
    grads = [torch.tensor([0.3, 0.4]) * trainer.loss_scale.scale]
    assert trainer._clip_gradients(grads, torch.nn.utils.get_total_norm(grads)) == pytest.approx(0.5)
    assert grads[0].tolist() == pytest.approx([0.3 * kept, 0.4 * kept], rel=1e-4)


def test_fp16_that_no_smaller_loss_scale_helps_ends_the_run(tmp_path: Path) -> None:
    """It would halve the scale at every update to the last one, and train nothing."""
    trainer = make_trainer(tmp_path)
    trainer.loss_scale = LossScale(torch.float16)
    trainer.loss_scale.scale = 1.0
    trainer.parameters[0].register_hook(lambda gradient: gradient * math.inf)
    trainer.train_step()  # left out, and tried with a half
    with pytest.raises(NonFiniteLossError, match="step 1: gradient norm is"):
        trainer.train_step()


def test_the_schedule_starts_at_the_first_update_and_ends_at_the_last(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, save_every=0, validate_every=0)
    trainer.fit()
    rates = {record["step"]: record["lr"] for record in trainer.metrics.read() if "loss" in record}
    # A peak of 0.01, two updates of warm-up; 65% of 12 are 8 updates of decay, of which the last one has 7 behind it:
    # 0.05 + 0.95 (1 - 7 / 8) = 0.16875.
    assert [rates[1], rates[2], rates[12]] == pytest.approx([0.005, 0.01, 0.0016875])


def test_what_is_drawn_after_a_checkpoint_is_drawn_again_after_a_resume(tmp_path: Path) -> None:
    """Dropout draws from torch's generator."""
    trainer = make_trainer(tmp_path)
    torch.manual_seed(5)
    trainer.train_step()
    trainer._save()
    trainer.writer.wait()
    expected = torch.rand(3)
    again = make_trainer(tmp_path)
    assert again.resume()
    assert torch.equal(torch.rand(3), expected)


class CountedRows:
    """16 rows of random tokens; counts the reads."""

    window_rows = (16,)

    def __init__(self) -> None:
        self.reads = 0

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> Batch:
        self.reads += 1
        return random_batch(SHAPE.vocab_size, len(row_indices), 32, seed=int(row_indices[0]))


class Unforeseen:
    """The same batches from a source that the Trainer knows nothing of."""

    def __init__(self, source: PackedBatches) -> None:
        self.source = source

    def micro_batches(self, step: int, share: Share) -> list[Batch]:
        return self.source.micro_batches(step, share)


def test_the_next_rows_are_read_while_a_step_is_under_way(tmp_path: Path) -> None:
    rows, others = CountedRows(), CountedRows()
    ahead = make_trainer(tmp_path / "ahead", steps=3, source=PackedBatches(rows, 0, 8, 4))
    plain = make_trainer(tmp_path / "plain", steps=3, source=Unforeseen(PackedBatches(others, 0, 8, 4)))
    for reads in (4, 6, 6):  # two micro-batches a step
        assert ahead.train_step() == plain.train_step()
        assert rows.reads == reads
    assert others.reads == 6


def test_patience_stops_early_and_the_best_checkpoint_survives(tmp_path: Path) -> None:
    # Random tokens cannot be learnt: held-out loss rises as soon as the model fits what it sees again and again.
    trainer = make_trainer(
        tmp_path, steps=200, source=OneBatch(), validate_every=2, save_every=0, patience=3, keep_last=1
    )
    trainer.fit()
    assert trainer.state.step < 200
    validations = [r for r in trainer.metrics.read() if "validation_loss" in r]
    best = min(validations, key=lambda r: r["validation_loss"])["step"]
    assert trainer.state.step == best + 3 * 2
    assert [c.step for c in list_checkpoints(tmp_path / "checkpoints")] == [best, trainer.state.step]
    trainer.load_best()
    assert trainer.state.best_step == best


def scripted(trainer: Trainer, losses: list[float]) -> None:
    """Let the validations say these losses; each must find its checkpoint written."""
    said = iter(losses)

    def validation(_: object) -> dict[str, float]:
        assert trainer.writer.newest_step() == trainer.state.step, "a checkpoint comes before each validation"
        return {"validation_loss": next(said)}

    trainer.validation = validation


def test_patience_counts_validations_in_a_row(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=40, validate_every=1, save_every=0, patience=3, keep_last=1)
    # After two without a better one comes the best. One as good as it is not better.
    scripted(trainer, [5, 4, 4.5, 4.2, 3, 3.5, 3, 3.1])
    trainer.fit()
    assert (trainer.state.step, trainer.state.best_step) == (8, 5)
    assert [c.step for c in list_checkpoints(trainer.checkpoints)] == [5, 8]


def test_a_validation_that_is_the_best_frees_the_one_before(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=3, validate_every=1, save_every=0, keep_last=1)
    scripted(trainer, [5, 4, 3])
    trainer.fit()
    assert [c.step for c in list_checkpoints(trainer.checkpoints)] == [3]


def test_training_goes_on_in_training_mode_whatever_an_evaluation_leaves(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, steps=2, validate_every=1)
    trainer.evaluations = [lambda model: {"figure": float(model.eval().training)}]
    trainer.fit()
    assert trainer.model.training


class OneBatch(RandomSource):
    """The same batch at every step."""

    def micro_batches(self, step: int, share: Share) -> list:
        return super().micro_batches(0, share)


def test_checkpoints_are_pruned(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, keep_last=2)
    (tmp_path / "config.yaml").write_text("sequence_length: 32\n")
    trainer.fit()
    kept = [c.step for c in list_checkpoints(tmp_path / "checkpoints")]
    assert kept[-1] == 12
    assert len(kept) <= 3  # the last two and the best
    newest = tmp_path / "checkpoints" / "step-00000012"
    sealed = {"shard-00001-model-00001-of-00001.safetensors", "state.json", "config.yaml"}
    assert {path.name for path in newest.iterdir()} == {*sealed, "complete.json"}
    assert json.loads((newest / "complete.json").read_text())["files"].keys() == sealed
    assert (newest / "config.yaml").read_text() == "sequence_length: 32\n"


class Ends(RandomSource):
    """Sees no sense in going on after so many updates."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def micro_batches(self, step: int, share: Share) -> list:
        if step == self.after:
            raise SourceStopsError("no sense in it")
        return super().micro_batches(step, share)


@pytest.mark.parametrize(("after", "saved"), [(3, [3]), (4, [3, 4])])
def test_where_a_source_ends_a_checkpoint_is_left_and_none_is_written_twice(
    tmp_path: Path, after: int, saved: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path, source=Ends(after), save_every=3, validate_every=0)
    written: list[int] = []
    save = trainer.writer.save

    def noted(step: int, *rest: Any, **more: Any) -> None:
        written.append(step)
        save(step, *rest, **more)

    monkeypatch.setattr(trainer.writer, "save", noted)
    with pytest.raises(SourceStopsError, match="no sense in it"):
        trainer.fit()
    assert written == saved
    assert [c.step for c in list_checkpoints(trainer.checkpoints)] == saved


class Doubted(RandomSource):
    doubted_since = 6
    """What the weights of six updates played was the first to be doubted."""


def test_the_newest_checkpoint_from_before_the_doubts_is_kept(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, source=Doubted(), keep_last=1, save_every=3, validate_every=0)
    trainer.fit()
    assert [c.step for c in list_checkpoints(trainer.checkpoints)] == [3, 12]
    assert trainer.load_before(12) == 3
    assert trainer.load_before(3) is None


def test_a_step_is_made_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The loop does not wait for the disk, and what is written is the moment of saving all the same."""
    may_write = threading.Event()
    write = HuggingFaceStorageWriter.write_data

    def write_late(*arguments: Any) -> Any:
        assert may_write.wait(60), "the loop waited for the checkpoint"
        return write(*arguments)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", write_late)
    trainer = make_trainer(tmp_path)
    trainer.train_step()
    at_saving = weights(trainer)
    trainer._save()
    trainer.train_step()
    assert not list_checkpoints(trainer.checkpoints)
    may_write.set()
    trainer.writer.wait()
    again = make_trainer(tmp_path)
    assert again.resume()
    assert again.state.step == 1
    assert all(torch.equal(weight, at_saving[name]) for name, weight in weights(again).items())


def test_gradients_travel_with_the_last_micro_batch_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In slices the result would be the same, at several times the messages."""
    trainer = make_trainer(tmp_path, source=RandomSource(4))
    said: list[bool] = []
    trainer.model.set_requires_gradient_sync = said.append  # type: ignore[assignment]
    monkeypatch.setattr("minnow.training.parallel.world_size", lambda: 2)
    trainer.train_step()
    assert said == [False, False, False, True]


def test_a_process_goes_on_in_its_random_numbers_beside_others(tmp_path: Path) -> None:
    """With another number of processes all began again with the masks of the first updates."""
    trainer = make_trainer(tmp_path)
    trainer._save()
    trainer.writer.wait()
    (checkpoint,) = list_checkpoints(trainer.checkpoints)
    file = checkpoint.folder / "state.json"
    state = json.loads(file.read_text())
    file.write_text(json.dumps(state | {"rng": state["rng"] * 2}))  # as two processes write it
    before = torch.get_rng_state()
    torch.manual_seed(7)
    checkpoint.load(trainer.model, trainer.optimizers)
    assert torch.equal(torch.get_rng_state(), before)
