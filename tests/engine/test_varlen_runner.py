"""The CUDA runner's bookkeeping on the CPU: with a plain function in the kernel's place it gives the same tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_helpers import random_prompts, tiny_model, tiny_tokenizer
from torch import Tensor

from minnow.engine import Engine, SamplingParams
from minnow.engine.blocks import BlockManager
from minnow.engine.cache import PagedCache
from minnow.engine.engine import Parts
from minnow.engine.scheduler import Scheduler
from minnow.engine.varlen_runner import Capture, VarlenRunner, block_table, padded_rows


def attend(
    q: Tensor, keys: Tensor, values: Tensor, cu_queries: Tensor, cu_lengths: Tensor, max_queries: int, max_length: int,
    *, window_size: tuple[int, int], enable_gqa: bool, seqused_k: Tensor, block_table: Tensor,
) -> Tensor:  # fmt: skip
    """What varlen_attn promises with a block table: the last query sees all `seqused_k` tokens."""
    assert window_size == (-1, 0)
    assert cu_queries.dtype == cu_lengths.dtype == seqused_k.dtype == block_table.dtype == torch.int32
    assert cu_lengths.diff().tolist() == seqused_k.tolist()
    out = torch.empty_like(q)
    for row, length in enumerate(seqused_k.tolist()):
        start, end = cu_queries[row : row + 2].tolist()
        assert end - start <= max_queries
        assert length <= max_length
        k, v = (store[block_table[row].long()].flatten(0, 1)[:length].transpose(0, 1) for store in (keys, values))
        mask = torch.ones(end - start, length, dtype=torch.bool).tril(length - (end - start))
        out[start:end] = F.scaled_dot_product_attention(
            q[start:end].transpose(0, 1), k, v, attn_mask=mask, enable_gqa=enable_gqa
        ).transpose(0, 1)
    return out


class Recorder:
    """Runs the function again, as a replayed graph would run its kernels, and counts."""

    def __init__(self) -> None:
        self.recorded = 0
        self.replayed = 0

    def __call__(self, function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        self.recorded += 1
        result = function().clone()

        def replay() -> None:
            self.replayed += 1
            result.copy_(function())

        return replay, result


def make_engine(capture: Capture | None, seed: int = 1, blocks: int = 40, max_step_tokens: int = 50) -> Engine:
    model = tiny_model(seed)
    engine = Engine(model, tiny_tokenizer())
    cache = PagedCache(model.config, blocks + 1, 8, torch.float32, torch.device("cpu"))
    runner = VarlenRunner(cache, model.config, 16, attend, capture)
    engine._made = Parts(Scheduler(BlockManager(blocks, 8), 16, max_step_tokens), runner)
    return engine


def answers(engine: Engine, **options: Any) -> list[list[list[int]]]:
    params = SamplingParams(**{"seed": 2, "n": 2, "max_tokens": 40, "ignore_eos": True, **options})
    return [[c.ids for c in output.completions] for output in engine.generate(random_prompts(8, 3), params)]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("recorded", [False, True])
def test_tokens_are_those_of_the_plain_runner(recorded: bool, temperature: float) -> None:
    recorder = Recorder() if recorded else None
    engine = make_engine(recorder)
    expected = answers(Engine(tiny_model(1), tiny_tokenizer()), temperature=temperature)
    assert answers(engine, temperature=temperature) == expected
    assert engine._made is not None
    assert engine._made.scheduler.preemptions > 0
    if recorder is not None:
        assert 0 < recorder.recorded <= 5  # 1, 2, 4, 8 and 16 rows
        assert recorder.replayed > 30


def test_recorded_steps_outlive_new_weights_where_they_lie_and_are_dropped_where_they_moved() -> None:
    recorder = Recorder()
    engine, other = make_engine(recorder), tiny_model(5)
    answers(engine)
    before = recorder.recorded
    engine.model.load_state_dict(other.state_dict())  # in place, as an optimizer does it
    engine.weights_updated()
    expected = answers(Engine(other, tiny_tokenizer()))
    assert answers(engine) == expected
    assert recorder.recorded == before
    third = tiny_model(6)
    engine.model.load_state_dict({k: v.clone() for k, v in third.state_dict().items()}, assign=True)
    engine.weights_updated()
    assert answers(engine) == answers(Engine(third, tiny_tokenizer()))
    assert recorder.recorded > before


def test_what_cannot_be_recorded_runs_as_it_is() -> None:
    def refuse(function: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = make_engine(refuse)
    with pytest.warns(UserWarning, match="not recorded"):
        assert answers(engine) == answers(Engine(tiny_model(1), tiny_tokenizer()))


def test_padded_rows() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 200)] == [1, 2, 4, 8, 8, 16, 16, 32, 208]


def test_block_table() -> None:
    np.testing.assert_array_equal(block_table([[3, 1], [2]], 3), [[3, 1, 0], [2, 0, 0]])
