"""Every way through the cache gives the tokens of the plain way: pieces, preemption, found prefixes, copies, abort."""

from __future__ import annotations

import pytest
import torch
from engine_helpers import full_logits, random_prompts, tiny_model, tiny_tokenizer

from minnow.engine import Delta, Engine, SamplingParams
from minnow.engine.blocks import BlockManager
from minnow.engine.cache import PagedCache, Window
from minnow.engine.parts import Parts
from minnow.engine.runner import Runner
from minnow.engine.scheduler import Scheduler


def make_engine(
    seed: int = 0, *, blocks: int | None = None, max_rows: int = 16, max_step_tokens: int = 10_000
) -> Engine:
    """Blocks of 8 tokens; with `blocks`, exactly so many of them (a context of 128 needs 16)."""
    model = tiny_model(seed)
    engine = Engine(model, tiny_tokenizer(), block_size=8, max_rows=max_rows, max_step_tokens=max_step_tokens)
    if blocks is not None:
        where = (torch.float32, torch.device("cpu"))
        engine._made = Parts(
            Scheduler(BlockManager(blocks, 8), max_rows, max_step_tokens),
            Runner(PagedCache(model.config, blocks, 8, *where), Window(model.config, max_rows, *where)),
        )
    return engine


def answers(engine: Engine, prompts: list[list[int]], params: SamplingParams) -> list[list[list[int]]]:
    return [[c.ids for c in output.completions] for output in engine.generate(prompts, params)]


def assert_all_free(engine: Engine) -> None:
    scheduler = engine._parts().scheduler
    assert scheduler.blocks.num_available == scheduler.blocks.num_blocks
    assert not scheduler.running
    assert not scheduler.waiting
    assert not engine.has_work


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_step_tokens", [1, 7, 50, 10_000])
def test_pieces_of_prompts_give_the_same_tokens(max_step_tokens: int, temperature: float) -> None:
    prompts = random_prompts(10, 1, longest=60)
    params = SamplingParams(temperature=temperature, seed=1, max_tokens=12, n=2)
    expected = [answers(make_engine(1), [prompt], params)[0] for prompt in prompts]
    engine = make_engine(1, max_step_tokens=max_step_tokens)
    read = []
    forward = engine.model.forward
    engine.model.forward = lambda tokens, *rest, **more: read.append(tokens.numel()) or forward(tokens, *rest, **more)
    assert answers(engine, prompts, params) == expected
    assert max(read) <= max_step_tokens
    assert_all_free(engine)


def test_decoding_goes_on_while_a_long_prompt_is_read() -> None:
    engine = make_engine(2, max_step_tokens=10)
    params = SamplingParams(seed=2, max_tokens=40, ignore_eos=True)
    first = engine.add([5, 6], params)
    engine.step()
    second = engine.add([7] * 80, params)
    seen = [request_id for _ in range(9) for request_id, _ in engine.step()]
    assert seen == [first] * 8 + [first, second]  # 9 prompt tokens a step beside one of the first: 9 steps for 80


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_preemption_gives_the_same_tokens(temperature: float) -> None:
    prompts = random_prompts(8, 4, longest=30)
    params = SamplingParams(temperature=temperature, seed=4, max_tokens=60, ignore_eos=True, n=2)
    expected = answers(make_engine(4), prompts, params)
    engine = make_engine(4, blocks=20)
    assert answers(engine, prompts, params) == expected
    assert engine._parts().scheduler.preemptions > 3
    assert_all_free(engine)


def test_the_oldest_gets_on_and_what_is_read_again_was_not_cached() -> None:
    """The youngest gives its blocks back: a token of the first request comes of every step until its end."""
    engine = make_engine(4, blocks=20)
    params = SamplingParams(seed=4, max_tokens=60, ignore_eos=True)
    first, *_ = ids = [engine.add([10 * i + 5] * 30, params) for i in range(3)]
    steps, usages = [], {}
    while engine.has_work:
        deltas = engine.step()
        steps.append([request_id for request_id, _ in deltas])
        usages |= {request_id: delta.usage for request_id, delta in deltas if delta.usage is not None}
    assert engine._parts().scheduler.preemptions > 0
    assert [first in step for step in steps] == [i < 60 for i in range(len(steps))]
    # No two prompts begin alike. What a request finds of its own when it is read again is no prefix found.
    assert [usages[request_id].cached_tokens for request_id in ids] == [0, 0, 0]


def test_what_begins_a_text_is_kept_longer_than_its_end() -> None:
    engine = make_engine(5, blocks=16)
    params = SamplingParams(temperature=0.0, max_tokens=1)
    text = list(range(10, 50))
    run(engine, text, params)  # leaves 5 blocks kept and 11 free
    run(engine, [7] * 97, params)  # takes 13: the last two of the text's blocks go
    assert cached_tokens(run(engine, [*text, 8], params)) == 24


def test_a_prefix_is_found_and_gives_the_same_tokens() -> None:
    shared = random_prompts(1, 5)[0][:1] * 5 + list(range(10, 40))  # 35 tokens: 4 blocks of 8 and a part
    prompts = [[*shared, *rest] for rest in random_prompts(6, 6, longest=10)]
    params = SamplingParams(temperature=0.0, max_tokens=10)
    expected = [answers(make_engine(5), [prompt], params)[0] for prompt in prompts]
    engine = make_engine(5)
    for prompt, answer in zip(prompts, expected, strict=True):
        deltas = run(engine, prompt, params)
        assert [delta.id for delta in deltas] == answer[0]
        assert cached_tokens(deltas) == (0 if prompt is prompts[0] else 32)
    # A talk goes on: its answer was cached as it was written, but for its last token, which nobody read.
    talk = prompts[0] + expected[0][0] + [9] * 5
    assert cached_tokens(run(engine, talk, params)) == (len(prompts[0]) + 9) // 8 * 8
    # All of this prompt is cached, but its last block is read for its logits.
    assert cached_tokens(run(engine, shared[:32], params)) == 24
    assert_all_free(engine)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Delta]:
    engine.add(prompt, params)
    deltas = []
    while engine.has_work:
        deltas += [delta for _, delta in engine.step()]
    return deltas


def cached_tokens(deltas: list[Delta]) -> int:
    assert deltas[-1].usage is not None
    return deltas[-1].usage.cached_tokens


def test_new_weights_find_no_old_prefix() -> None:
    engine, other = make_engine(6), tiny_model(7)
    prompt = list(range(10, 50))
    params = SamplingParams(temperature=0.0, max_tokens=10)
    engine.generate([prompt], params)
    engine.model.load_state_dict(other.state_dict())
    engine.weights_updated()
    assert cached_tokens(run(engine, prompt, params)) == 0
    assert answers(engine, [prompt], params) == answers(Engine(other, tiny_tokenizer()), [prompt], params)


def test_samples_share_blocks_until_they_write() -> None:
    engine = make_engine(8)
    params = SamplingParams(seed=5, n=4, max_tokens=30, ignore_eos=True)
    engine.add([5] * 20, params)  # 2 blocks and a half
    engine.step()
    scheduler = engine._parts().scheduler
    used = scheduler.blocks.num_blocks - scheduler.blocks.num_available
    assert used == 3
    engine.step()  # three of the four copy the half block; the last owner keeps it
    assert scheduler.blocks.num_blocks - scheduler.blocks.num_available == 6
    tables = [sequence.blocks for sequence in scheduler.running]
    assert len({tuple(table[:2]) for table in tables}) == 1
    assert len({table[2] for table in tables}) == 4
    while engine.has_work:
        engine.step()
    assert_all_free(engine)


def test_paged_logits_equal_uncached_ones() -> None:
    """Log-probabilities of every sampled token, over preemption, pieces and shared blocks, against one plain pass."""
    prompts = random_prompts(8, 9, longest=30)
    engine = make_engine(9, blocks=24, max_step_tokens=23)
    params = SamplingParams(seed=6, max_tokens=50, ignore_eos=True, n=2, logprobs=True)
    for output in engine.generate(prompts, params):
        for completion in output.completions:
            logits = full_logits(engine.model, output.prompt_ids + completion.ids)[len(output.prompt_ids) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
            assert completion.logprobs == pytest.approx(expected.tolist(), abs=1e-5)
            assert completion.raw_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
    assert engine._parts().scheduler.preemptions > 0


def test_a_row_is_gathered_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When it begins to decode: anew for every token it would copy its whole past every time."""
    gathered, gather = [], Window._gather
    monkeypatch.setattr(Window, "_gather", lambda self, rows, *rest: gathered.append(rows) or gather(self, rows, *rest))
    params = SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True)
    make_engine(3).generate([[5, 6], [7, 8, 9]], params)
    assert gathered == [[0, 1]]


def test_abort_in_every_state_frees_the_blocks() -> None:
    params = SamplingParams(seed=7, n=3, max_tokens=20, ignore_eos=True)
    for steps in range(12):
        engine = make_engine(10, blocks=17, max_rows=6, max_step_tokens=16)
        ids = [engine.add(prompt, params) for prompt in random_prompts(4, 11, longest=40)]
        for _ in range(steps):
            engine.step()
        for request_id in ids[1:]:
            engine.abort(request_id)
        while engine.has_work:
            assert {request_id for request_id, _ in engine.step()} <= {ids[0]}
        assert_all_free(engine)
