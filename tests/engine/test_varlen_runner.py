"""The CUDA runner's bookkeeping on the CPU: with a plain function in the kernel's place it gives the same tokens."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from engine_helpers import random_prompts, seeing_model, seeing_tokenizer, shown, tiny_model, tiny_tokenizer
from torch import Tensor

from minnow.engine import Engine, SamplingParams
from minnow.engine.blocks import BlockManager
from minnow.engine.cache import PagedCache, Window
from minnow.engine.graphs import Capture, NoWaiting, Recordings, padded_rows
from minnow.engine.parts import Parts
from minnow.engine.runner import Runner, padded_reach
from minnow.engine.scheduler import Scheduler
from minnow.engine.varlen_runner import VarlenRunner, block_table, decode_inputs
from minnow.model.attention import causal
from minnow.model.transformer import CausalLM


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


def make_engine(
    capture: Capture | None,
    seed: int = 1,
    blocks: int = 40,
    max_step_tokens: int = 50,
    *,
    window: bool = False,
    frozen: bool = False,
    model: CausalLM | None = None,
) -> Engine:
    """window: the runner of devices without the kernel, recorded all the same."""
    model = model or tiny_model(seed)
    engine = Engine(model, tiny_tokenizer(), frozen=frozen)
    cache = PagedCache(model.config, blocks + 1, 8, torch.float32, torch.device("cpu"))
    runner: Runner | VarlenRunner
    if window:
        runner = Runner(cache, Window(model.config, 13, torch.float32, torch.device("cpu")), capture)
    else:
        runner = VarlenRunner(cache, model.config, 16, causal(attend), capture)
    rows = 13 if window else 16
    engine._made = Parts(Scheduler(BlockManager(blocks, 8), rows, max_step_tokens), runner)
    return engine


def answers(engine: Engine, **options: Any) -> list[list[list[int]]]:
    params = SamplingParams(**{"seed": 2, "n": 2, "max_tokens": 40, "ignore_eos": True, **options})
    return [[c.ids for c in output.completions] for output in engine.generate(random_prompts(8, 3), params)]


@pytest.mark.parametrize("window", [False, True])
def test_pictures_are_seen_as_by_the_plain_runner(window: bool) -> None:
    """Pieces of 7 tokens cut them in two, and those that made room are read again."""
    prompts = [shown(0), shown(1, 2, 3), [50, 60, 70], shown(0, text="Blue?"), shown(4, 0)]
    params = SamplingParams(seed=2, n=2, max_tokens=40, ignore_eos=True)
    engine = make_engine(Recorder(), blocks=20, max_step_tokens=7, window=window, model=seeing_model())
    expected = Engine(seeing_model(), seeing_tokenizer()).generate(prompts, params)
    assert [o.completions for o in engine.generate(prompts, params)] == [o.completions for o in expected]
    assert engine._made is not None
    assert engine._made.scheduler.preemptions > 0


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("window", [False, True])
@pytest.mark.parametrize("recorded", [False, True])
def test_tokens_are_those_of_the_plain_runner(recorded: bool, window: bool, temperature: float) -> None:
    recorder = Recorder() if recorded else None
    engine = make_engine(recorder, window=window)
    expected = answers(Engine(tiny_model(1), tiny_tokenizer()), temperature=temperature)
    assert answers(engine, temperature=temperature) == expected
    assert engine._made is not None
    assert engine._made.scheduler.preemptions > 0
    if recorder is not None:
        assert 0 < recorder.recorded <= 5  # 1, 2, 4, 8 and 16 rows
        assert recorder.replayed > 30


@pytest.mark.parametrize("window", [False, True])
def test_recorded_steps_outlive_new_weights_where_they_lie_and_are_dropped_where_they_moved(window: bool) -> None:
    recorder = Recorder()
    engine, other = make_engine(recorder, window=window), tiny_model(5)
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


def test_a_frozen_copy_made_anew_is_recorded_anew() -> None:
    recorder = Recorder()
    engine, other = make_engine(recorder, window=True, frozen=True), tiny_model(5)
    answers(engine)
    before, old = recorder.recorded, engine._running  # kept, so that the new copy cannot lie where it lay
    engine.model.load_state_dict(other.state_dict())
    engine.weights_updated()
    assert answers(engine) == answers(Engine(other, tiny_tokenizer(), frozen=True))
    assert engine._running is not old
    assert recorder.recorded > before


def test_a_buffer_that_moved_drops_the_recordings_too() -> None:
    recorder = Recorder()
    recordings, model = Recordings(recorder), torch.nn.BatchNorm1d(4, affine=False)
    step = lambda: model.running_mean + 1  # noqa: E731
    recordings.run(model, 1, step)
    kept, model.running_mean = model.running_mean, torch.full((4,), 5.0)
    recordings.forget()
    assert recordings.run(model, 1, step).tolist() == [6.0] * 4
    assert recorder.recorded == 2
    assert kept.tolist() == [0.0] * 4


@pytest.mark.parametrize("window", [False, True])
def test_what_cannot_be_recorded_runs_as_it_is(window: bool) -> None:
    def refuse(function: Callable[[], Tensor]) -> Any:
        raise RuntimeError("operation not permitted when stream is capturing")

    engine = make_engine(refuse, window=window)
    with pytest.warns(UserWarning, match="not recorded"):
        assert answers(engine) == answers(Engine(tiny_model(1), tiny_tokenizer()))


def test_padded_rows() -> None:
    assert [padded_rows(n) for n in (1, 2, 3, 5, 8, 9, 16, 17, 200)] == [1, 2, 4, 8, 8, 16, 16, 32, 208]


def test_padded_reach() -> None:
    assert [padded_reach(n) for n in (1, 256, 257, 512, 513, 1025)] == [256, 256, 512, 512, 1024, 2048]


def test_out_of_memory_while_recording_is_no_reason_to_go_on_without_recording() -> None:
    def full(function: Callable[[], Tensor]) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    engine = make_engine(full)
    with pytest.raises(torch.OutOfMemoryError):
        answers(engine)


def test_rows_that_fill_up_a_recorded_step_stay_in_the_spare_block() -> None:
    inputs_BI = decode_inputs([], 2, block_size=8, spare_block=5, width=3)
    np.testing.assert_array_equal(inputs_BI, [[0, 0, 40, 1, 5, 0, 0]] * 2)


def varlen_2_10(q, k, v, cu_q, cu_k, max_q, max_k, is_causal=False, return_aux=None):  # type: ignore[no-untyped-def]
    return is_causal


def varlen_2_11(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1)):  # type: ignore[no-untyped-def]
    return window_size


def varlen_2_13(  # type: ignore[no-untyped-def]
    q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False, block_table=None
):
    return window_size, enable_gqa


@pytest.mark.parametrize(
    ("varlen_attn", "expected"),
    [(varlen_2_10, True), (varlen_2_11, (-1, 0)), (varlen_2_13, ((-1, 0), True))],
    ids=["2.10", "2.11", "2.13"],
)
def test_every_torch_is_told_in_its_own_words_to_attend_causally(varlen_attn: Any, expected: Any) -> None:
    assert causal(varlen_attn)(*range(7)) == expected


def test_the_installed_torch_takes_those_words() -> None:
    from torch.nn.attention.varlen import varlen_attn

    assert isinstance(causal(varlen_attn), partial)
    tensors = [torch.empty(6, heads, 8, device="meta", dtype=torch.bfloat16) for heads in (4, 2, 2)]
    borders = torch.tensor([0, 6], dtype=torch.int32, device="meta")
    assert causal(varlen_attn)(*tensors, borders, borders, 6, 6).shape == (6, 4, 8)


def test_block_table() -> None:
    np.testing.assert_array_equal(block_table([[3, 1], [2]], 3), [[3, 1, 0], [2, 0, 0]])


@pytest.mark.parametrize(
    "step",
    [
        lambda x: x * x.sum().item(),
        lambda x: x * float(x[0]),
        lambda x: x[x > 0],
        lambda x: x.masked_fill(x > 9, 0.0) if (x > 0).any() else x,
        lambda x: x.nonzero(),
        lambda x: x.index_put_((x > 0,), x),
        lambda x: x.to("meta"),
        lambda x: torch.empty(4, device="meta").copy_(x),
    ],
)
def test_steps_that_wait_for_the_device_are_refused(step: Callable[[Tensor], Tensor]) -> None:
    with NoWaiting(), pytest.raises(RuntimeError, match="synchronizes"):
        step(torch.ones(4))


def test_a_compiled_step_stays_compiled_while_it_is_looked_at() -> None:
    compiled = torch.compile(lambda x: x.sin() + 1, backend="eager", fullgraph=True)
    compiled(torch.ones(4))
    with NoWaiting():
        result = compiled(torch.ones(4))
    assert torch.equal(result, torch.ones(4).sin() + 1)


def test_a_whole_step_of_either_runner_does_not_wait() -> None:
    def strict(function: Callable[[], Tensor]) -> tuple[Callable[[], None], Tensor]:
        with NoWaiting():
            function()
        return Recorder()(function)

    for window in (False, True):
        # Beside the runner of blocks stands a plain function for the kernel, which reads its lengths.
        engine = make_engine(strict, window=window, frozen=True)
        if isinstance(runner := engine._parts().runner, VarlenRunner):
            runner._attend = lambda q, *rest, **more: q
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # a step that could not be recorded warns
            answers(engine, temperature=0.0)


def test_later_pieces_of_prompts_take_flash_attention_where_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[tuple[int, int]] = []

    def flash(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int) -> Tensor:
        """What varlen_attn does without a block table, as in torch 2.11: the last query sees all keys."""
        assert cu_q.dtype == cu_k.dtype == torch.int32
        out = []
        for part in zip(
            *(x.tensor_split(cu[1:-1].tolist()) for x, cu in ((q, cu_q), (k, cu_k), (v, cu_k))), strict=True
        ):
            queries, keys = len(part[0]), len(part[1])
            assert 0 < queries <= max_q
            assert queries < keys <= max_k
            pieces.append((queries, keys))
            mask = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)
            heads = (x.transpose(0, 1) for x in part)
            out.append(F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True).transpose(0, 1))
        return torch.cat(out)

    monkeypatch.setattr("minnow.engine.attention.flash_attention", lambda device, dtype, head_dim: flash)
    assert answers(make_engine(None, window=True)) == answers(Engine(tiny_model(1), tiny_tokenizer()))
    assert len(pieces) > 3


def test_cudnn_plans_no_attention_of_ours() -> None:
    assert not torch.backends.cuda.cudnn_sdp_enabled()
