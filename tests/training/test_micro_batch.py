"""`micro_batch_tokens auto`: the search itself with made-up memory, and what it leaves behind, on a CPU."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st

from minnow.config import UserError
from minnow.data.batches import Batch, Share
from minnow.data.prepare import DataConfig
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.optim import OptimConfig, build_optimizers
from minnow.out_of_memory import OutOfMemory
from minnow.stages import language_model, pretrain
from minnow.tokenizer import train_tokenizer
from minnow.training import micro_batch
from minnow.training.config import TrainingConfig
from minnow.training.micro_batch import equal_pieces, find_micro_batch, largest_that_fits, sizes_of
from minnow.training.objective import LanguageModeling, ObjectiveOutput
from minnow.training.probe import random_batch
from minnow.training.trainer import Trainer

from .helpers import SHAPE


def test_sizes_by_hand() -> None:
    # 8 rows in 1, 2, 3, 4, 5 to 7, 8 pieces have at most 8, 4, 3, 2, 2, 1 rows.
    assert sizes_of(8, 1) == [1, 2, 3, 4, 8]
    # Of 8 rows, 3 processes have 3, 3 and 2: in one piece or in two, for the last has no third row to give.
    assert sizes_of(8, 3) == [2, 3]


@given(st.integers(1, 200), st.integers(1, 8))
def test_every_size_cuts_every_process_into_as_many_pieces(rows: int, processes: int) -> None:
    if rows < processes:
        return
    for size in sizes_of(rows, processes):
        cut = [Share(rank, processes).cut(np.arange(rows), size) for rank in range(processes)]
        assert len({len(pieces) for pieces in cut}) == 1
        assert max(len(piece) for pieces in cut for piece in pieces) <= size


@given(st.integers(1, 300), st.floats(0, 1e9), st.floats(1, 1e8), st.floats(1, 1e10))
def test_the_search_finds_the_largest_that_fits_and_hardly_ever_runs_out(
    rows: int, fixed: float, each: float, budget: float
) -> None:
    tried: list[int] = []

    def trial(size: int) -> float:
        tried.append(size)
        return fixed + each * size

    sizes = sizes_of(rows, 1)
    fitting = [size for size in sizes if fixed + each * size <= budget * (1 - 1e-9)]
    found = largest_that_fits(sizes, trial, budget)
    assert found >= max(fitting, default=0)
    assert fixed + each * found <= budget * (1 + 1e-9) or found == 0
    assert len(tried) == len(set(tried)) <= 2 * math.log2(rows + 1) + 2
    # Only the first two trials have no prediction before them.
    assert all(size in tried[:2] for size in tried if fixed + each * size > budget * (1 + 1e-9))


def test_a_trial_that_ran_out_is_no_point_of_the_line() -> None:
    def trial(size: int) -> float:
        return 10.0 * size if size < 5 else math.inf

    assert largest_that_fits([1, 2, 3, 4, 5, 6, 8, 12, 24], trial, 1e9) == 4
    assert largest_that_fits([5, 6], trial, 1e9) == 0


def test_memory_that_does_not_grow_along_a_line_is_measured_before_it_is_believed() -> None:
    # The first two sizes are below the allocator's granularity: they predict that everything fits.
    assert largest_that_fits([1, 2, 4, 8, 16], lambda size: max(100.0, 50.0 * size), 500.0) == 8


def test_equal_pieces() -> None:
    assert equal_pieces(64, 31) == 16
    assert equal_pieces(64, 64) == 64
    assert equal_pieces(15, 10) == 5  # just half of it
    assert equal_pieces(61, 21) == 21  # a prime number of rows: pieces of 21, 20 and 20


class FakeGPU:
    """Memory of a made-up GPU: a row takes 100 bytes, everything else 1,000, and `total` is all there is."""

    def __init__(self, total: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.total, self.peak, self.seen = total, 1000, []
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (total - 1000, total))
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1000)
        monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda device: self.peak)
        monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", self.reset)
        monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)

    def reset(self, device: torch.device) -> None:
        self.peak = 1000

    def take(self, rows: int) -> None:
        self.seen.append(rows)
        if 1000 + 100 * rows > self.total:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        self.peak = 1000 + 100 * rows


class Watched(LanguageModeling):
    """The objective, on the made-up GPU, looking at what stands beside it."""

    def __init__(self, gpu: FakeGPU, optimizers: list[torch.optim.Optimizer]) -> None:
        super().__init__()
        object.__setattr__(self, "gpu", gpu)
        object.__setattr__(self, "optimizers", optimizers)

    def __call__(self, model: CausalLM, batch: Batch) -> ObjectiveOutput:
        gpu: FakeGPU = self.gpu  # type: ignore[attr-defined]
        gpu.take(len(batch.tokens_BT))
        assert model.training
        assert not model.is_compiled
        assert all(optimizer.state for optimizer in self.optimizers), "no optimizer state is held"  # type: ignore[attr-defined]
        return super().__call__(model, batch)


class Rows:
    num_rows = 5  # fewer than a batch: they are read again

    @property
    def window_rows(self) -> Iterator[int]:
        return iter([self.num_rows])

    def batch(self, row_indices: Any) -> Batch:
        assert max(row_indices) < self.num_rows
        return random_batch(SHAPE.vocab_size, len(row_indices), 8)


@pytest.mark.parametrize("total", [1400, 2500, 5000])
def test_the_search_takes_what_fits_with_headroom_and_leaves_everything_as_it_was(
    total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpu, model = FakeGPU(total, monkeypatch), CausalLM(SHAPE, seed=1)
    model._compiled = kept = object()  # type: ignore[assignment]
    model.eval()
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rates = [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    cpu = torch.device("cpu")
    found = find_micro_batch(model, optimizers, Watched(gpu, optimizers), Rows(), 32, cpu)
    # 90% of the memory: (0.9 x 1400 - 1000) / 100 = 2.6 rows, 12.5 rows, 35 rows; of 32 rows cut evenly.
    assert found == {1400: 2, 2500: 8, 5000: 32}[total]
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(optimizer.state for optimizer in optimizers)
    assert rates == [group["lr"] for optimizer in optimizers for group in optimizer.param_groups]
    assert model._compiled is kept
    assert not model.training
    assert set(gpu.seen) <= set(sizes_of(32, 1))


def test_rows_are_tried_that_show_the_most_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else a run would end at the first micro-batch that shows more of them than its first rows do."""
    gpu, model = FakeGPU(1400, monkeypatch), CausalLM(SHAPE, seed=1)
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    pictures, tried = (0, 1, 3, 0, 2), []

    class Album(Rows):
        def batch(self, row_indices: Any) -> Batch:
            tried.append(list(row_indices))
            places = [place + 8 * at for at, row in enumerate(row_indices) for place in range(2 * pictures[row])]
            return replace(super().batch(row_indices), image_places_M=torch.tensor(places))

    find_micro_batch(model, optimizers, Watched(gpu, optimizers), Album(), 7, torch.device("cpu"))
    assert tried[0] == [0, 1, 2, 3, 4]
    assert tried[1:] == [[2], [2, 4]]


def test_a_process_with_less_memory_decides_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, model = FakeGPU(5000, monkeypatch), CausalLM(SHAPE, seed=1)
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    # Another process holds 1,000 bytes more in every trial; budgets come as negative numbers.
    monkeypatch.setattr(micro_batch, "largest_over_ranks", lambda value: value + 1000 if value >= 0 else value)
    found = find_micro_batch(model, optimizers, Watched(gpu, optimizers), Rows(), 32, torch.device("cpu"))
    assert found == 16  # 4500 - 2000 = 25 rows


def test_not_one_row_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu, model = FakeGPU(1050, monkeypatch), CausalLM(SHAPE, seed=1)
    optimizers = build_optimizers(model, OptimConfig(), tokens_per_batch=512)
    with pytest.raises(OutOfMemory, match="not even one row"):
        find_micro_batch(model, optimizers, Watched(gpu, optimizers), Rows(), 32, torch.device("cpu"))


# --- In a run -------------------------------------------------------------------------------------


def test_auto_is_a_word_of_the_configuration() -> None:
    auto = TrainingConfig(micro_batch_tokens="auto", batch_tokens=65_536)
    assert auto.rows_per_batch(1024) == 64
    assert auto.rows_at_once(1024) == 16
    with pytest.raises(UserError, match="micro_batch_tokens is 0"):
        TrainingConfig(micro_batch_tokens=0)


@pytest.fixture
def config(tmp_path: Path) -> pretrain.Config:
    texts = [f"The {colour} fish number {i} swims in the pond." for i in range(40) for colour in ("red", "blue")]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in texts))
    train_tokenizer(texts, 300).save_pretrained(tmp_path / "tokenizer")
    return pretrain.Config(
        run=str(tmp_path / "run"),
        tokenizer=str(tmp_path / "tokenizer"),
        data=DataConfig(paths=(str(tmp_path / "texts.jsonl"),), cache_dir=str(tmp_path / "cache")),
        model=ModelConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=1, num_key_value_heads=1
        ),
        sequence_length=32,
        training=TrainingConfig(
            steps=2, batch_tokens=256, micro_batch_tokens="auto", device="cpu", precision="fp32", compile="off"
        ),
    )


def test_what_auto_came_to_stands_in_the_run_and_is_taken_from_there(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[int] = []
    source = language_model.PackedBatches

    def watched(*arguments: Any) -> Any:
        taken.append(arguments[-1])
        return source(*arguments)

    monkeypatch.setattr(language_model, "PackedBatches", watched)
    pretrain.run(config)
    written = Path(config.run) / "config.yaml"
    assert yaml.safe_load(written.read_text())["training"]["micro_batch_tokens"] == 256  # all 8 rows of the batch
    # As if a GPU had been found to hold two rows: the same command goes on with these, whatever fits by now.
    written.write_text(written.read_text().replace("micro_batch_tokens: 256", "micro_batch_tokens: 64"))
    (Path(config.run) / "model" / "config.json").unlink()
    pretrain.run(config)
    pretrain.run(replace(config, overwrite=True))
    assert taken == [8, 2, 8]


def test_another_micro_batch_may_continue_a_run(config: pretrain.Config) -> None:
    """It is what a run that ran out of memory needs."""
    pretrain.run(config)
    (Path(config.run) / "model" / "config.json").unlink()
    smaller = replace(config.training, micro_batch_tokens=64, gradient_checkpointing="full")
    pretrain.run(replace(config, training=smaller))
    written = yaml.safe_load((Path(config.run) / "config.yaml").read_text())
    assert written["training"]["micro_batch_tokens"] == 64


def test_a_run_that_ran_out_of_memory_goes_on_in_smaller_pieces(
    config: pretrain.Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    step = Trainer.train_step

    def full_at_the_third(self: Trainer) -> dict[str, float]:
        if self.state.step == 2:
            torch.empty(2**50, dtype=torch.uint8)
        return step(self)

    training = replace(config.training, steps=4, micro_batch_tokens=128, save_every=1)
    monkeypatch.setattr(Trainer, "train_step", full_at_the_third)
    with pytest.raises(OutOfMemory) as caught:
        pretrain.run(replace(config, training=training))
    message = str(caught.value)
    assert message.startswith("out of memory while training; step 3 of 4: 1048576.0 GiB more were asked for")
    assert "--training.micro_batch_tokens 64:" in message
    assert "the last checkpoint is whole" in message
    monkeypatch.setattr(Trainer, "train_step", step)
    pretrain.run(replace(config, training=replace(training, micro_batch_tokens=64)))
    lines = [json.loads(line) for line in (Path(config.run) / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
