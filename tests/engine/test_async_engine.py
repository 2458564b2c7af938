"""The engine behind asyncio: the same answers, aborted when nobody listens, refused when full, drained in the end."""

from __future__ import annotations

import asyncio
import dataclasses
import re
import threading
from collections.abc import Iterator
from contextlib import ExitStack, aclosing

import pytest
from engine_helpers import LATE, WIDE, random_prompts, tiny_model, tiny_tokenizer

from minnow.config import UserError
from minnow.engine import Engine, SamplingParams
from minnow.engine.async_engine import AsyncEngine, ClosedError, QueueFullError
from minnow.engine.grammar import Constraint, regex_grammar

LONG = SamplingParams(max_tokens=100, ignore_eos=True)


@pytest.fixture
def engine() -> Iterator[AsyncEngine]:
    engine = AsyncEngine(Engine(tiny_model(), tiny_tokenizer()), max_answers=40)
    yield engine
    engine.close()


async def quiet(engine: AsyncEngine) -> None:
    async with asyncio.timeout(30):
        while engine.in_flight or engine.engine.has_work:
            await asyncio.sleep(0.01)


def test_streams_together_equal_generate(engine: AsyncEngine) -> None:
    prompts = random_prompts(12)
    params = [SamplingParams(seed=seed, max_tokens=20, n=2) for seed in range(12)]
    expected = Engine(tiny_model(), tiny_tokenizer()).generate(prompts, params)

    async def one(i: int) -> list[list[int]]:
        ids: list[list[int]] = [[], []]
        async for delta in engine.stream(prompts[i], params[i]):
            ids[delta.index].append(delta.id)
        return ids

    async def all_of_them() -> list[list[list[int]]]:
        return await asyncio.gather(*map(one, range(12)))

    answers = asyncio.run(all_of_them())
    assert answers == [[completion.ids for completion in output.completions] for output in expected]
    assert engine.in_flight == 0


def test_a_grammar_is_compiled_beside_the_answers_under_way(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A schema of 50,000 words takes most of a second, in which every stream stood still."""
    began, go_on = threading.Event(), threading.Event()
    compile = engine.engine.constraint

    def held(params: SamplingParams) -> Constraint | None:
        began.set()
        assert go_on.wait(60), "the other answer waits for it"
        return compile(params)

    async def talk() -> str:
        async with aclosing(engine.stream([5], LONG)) as deltas:
            await anext(deltas)
            monkeypatch.setattr(engine.engine, "constraint", held)
            params = SamplingParams(grammar=regex_grammar("[ab]{3}"))
            asked = asyncio.create_task(engine.submit([6], params))
            assert await asyncio.to_thread(began.wait, 60)
            assert len([delta async for delta in deltas]) == LONG.max_tokens - 1
        go_on.set()
        return "".join([delta.text async for delta in await asked])

    assert re.fullmatch("[ab]{3}", asyncio.run(talk()))
    assert engine.in_flight == 0


def test_no_grammar_is_compiled_for_a_request_that_is_refused(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled: list[SamplingParams] = []
    monkeypatch.setattr(engine.engine, "constraint", compiled.append)

    async def ask() -> None:
        params = SamplingParams(grammar=regex_grammar("[ab]{3}"))
        for prompt, reason in (([5] * 200, "the prompt has 200 tokens"), ([10**6], "vocabulary"), ([], "no tokens")):
            with pytest.raises(UserError, match=reason):
                await engine.submit(prompt, params)
        with pytest.raises(UserError, match="no adapter"):
            await engine.submit([5], dataclasses.replace(params, adapter="none"))

    asyncio.run(ask())
    assert not compiled
    assert engine.in_flight == 0


def test_who_leaves_while_the_grammar_is_compiled_leaves_nothing(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    began, go_on = threading.Event(), threading.Event()

    def held(params: SamplingParams) -> None:
        began.set()
        assert go_on.wait(60)

    async def leave() -> None:
        monkeypatch.setattr(engine.engine, "constraint", held)
        asked = asyncio.create_task(engine.submit([6], SamplingParams(grammar=regex_grammar("[ab]{3}"))))
        assert await asyncio.to_thread(began.wait, 60)
        assert engine.in_flight == 1
        asked.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asked
        assert engine.in_flight == 0
        go_on.set()
        assert not await engine.call(lambda own: own.has_work)

    asyncio.run(leave())


def test_leaving_aborts(engine: AsyncEngine) -> None:
    async def leave() -> None:
        async with aclosing(engine.stream([5], LONG)) as deltas:
            await anext(deltas)
        await quiet(engine)
        answer = await engine.submit([6], LONG)
        assert engine.in_flight == 1
        answer.close()
        answer.close()  # harmless
        await quiet(engine)

        async def endless() -> None:
            async for _ in engine.stream([7], LONG):
                await asyncio.sleep(0.01)

        listening = asyncio.create_task(endless())
        await asyncio.sleep(0.1)
        listening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await listening
        await quiet(engine)

    asyncio.run(leave())


def test_the_queue_is_bounded_by_samples(engine: AsyncEngine) -> None:
    async def fill() -> None:
        answer = await engine.submit([5], SamplingParams(max_tokens=100, ignore_eos=True, n=39))
        with pytest.raises(QueueFullError, match="of 40 at most"):
            await engine.submit([5], SamplingParams(n=2))
        last = await engine.submit([5], SamplingParams(n=1, max_tokens=1, ignore_eos=True))
        assert [delta.finish_reason async for delta in last] == ["length"]
        answer.close()
        await quiet(engine)

    asyncio.run(fill())


def test_between_two_steps_there_is_one_computation(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    """Eight are waiting when an answer begins: its tokens come between them."""
    events: list[str] = []
    step, gate = engine.engine.step, threading.Event()
    monkeypatch.setattr(engine.engine, "step", lambda: events.append("step") or step())

    async def beside_an_answer() -> None:
        waits = asyncio.create_task(engine.call(lambda _: gate.wait()))
        computations = [asyncio.create_task(engine.compute(lambda _: events.append("computation"))) for _ in range(8)]
        submitted = asyncio.create_task(engine.submit([5], SamplingParams(max_tokens=5, ignore_eos=True)))
        await asyncio.sleep(0)  # all of them are in the line now
        gate.set()
        await asyncio.gather(waits, *computations)
        assert len([delta async for delta in await submitted]) == 5

    asyncio.run(beside_an_answer())
    assert events[:15] == ["computation", "step"] * 7 + ["computation"]


def test_computations_have_places_and_need_somebody_who_waits(engine: AsyncEngine) -> None:
    async def fill() -> None:
        with ExitStack() as places:
            for _ in range(40):
                places.enter_context(engine.place())
            with pytest.raises(QueueFullError, match="of 40 at most"), engine.place():
                pass
            with pytest.raises(QueueFullError):
                await engine.submit([5])
        assert engine.in_flight == 0

    async def leave() -> None:
        gate, ran = threading.Event(), []
        waits = asyncio.create_task(engine.call(lambda _: gate.wait()))
        left, stays = (asyncio.create_task(engine.compute(lambda _, i=i: ran.append(i))) for i in range(2))
        await asyncio.sleep(0)
        left.cancel()
        await asyncio.sleep(0)
        gate.set()
        await asyncio.gather(waits, stays)
        assert ran == [1]

    asyncio.run(fill())
    asyncio.run(leave())


def test_closing_tells_those_whose_computation_waits(engine: AsyncEngine) -> None:
    async def close() -> None:
        gate = threading.Event()
        waits = asyncio.create_task(engine.call(lambda _: gate.wait()))
        others = [asyncio.create_task(engine.compute(lambda _: None)) for _ in range(3)]
        await asyncio.sleep(0)
        closing = asyncio.create_task(asyncio.to_thread(engine.close))
        while not engine._stopped:
            await asyncio.sleep(0.001)
        gate.set()
        await closing
        assert await waits
        for other in others:
            with pytest.raises(ClosedError):
                await other

    asyncio.run(close())


def test_a_mistake_reaches_who_made_it(engine: AsyncEngine) -> None:
    async def wrong() -> None:
        with pytest.raises(UserError, match="vocabulary"):
            await engine.submit([10**6])
        assert engine.in_flight == 0
        with pytest.raises(ZeroDivisionError):
            await engine.call(lambda _: 1 // 0)
        assert await engine.call(lambda own: own is engine.engine)

    asyncio.run(wrong())


def test_a_failed_step_fails_its_answers_and_no_others(engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch) -> None:
    async def fail() -> None:
        with monkeypatch.context() as patch:
            patch.setattr(engine.engine, "step", lambda: [][0])
            with pytest.raises(IndexError):
                await anext(await engine.submit([5], LONG))
        await quiet(engine)
        assert [delta.id async for delta in engine.stream([5], SamplingParams(max_tokens=1))]

    asyncio.run(fail())


def test_a_cache_without_memory_refuses_its_request_and_the_next_may_find_some(
    engine: AsyncEngine, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The request stayed in the engine, whose steps failed for it without end."""

    def fail(*_: object) -> None:
        raise MemoryError

    async def ask() -> None:
        with monkeypatch.context() as patch:
            patch.setattr("minnow.engine.parts.PagedCache", fail)
            with pytest.raises(MemoryError):
                await engine.submit([5])
            assert not await engine.call(lambda own: own.has_work)
        assert [delta.id async for delta in engine.stream([5], SamplingParams(max_tokens=1))]

    asyncio.run(ask())
    assert not caplog.records


def test_a_grammar_that_fails_ends_only_its_own_answer(engine: AsyncEngine, caplog: pytest.LogCaptureFixture) -> None:
    async def one(grammar: str) -> None:
        with pytest.raises(UserError, match="cannot be followed"):
            async for _ in engine.stream([6], SamplingParams(grammar=grammar, seed=1)):
                pass

    async def beside_another() -> None:
        answer = await engine.submit([5], LONG)
        await asyncio.gather(one(WIDE), one(LATE))
        assert len([delta async for delta in answer]) == 100
        assert engine.in_flight == 0

    asyncio.run(beside_another())
    assert not caplog.records


def test_drain_and_close(engine: AsyncEngine) -> None:
    async def drain() -> None:
        answer = await engine.submit([5], SamplingParams(max_tokens=30, ignore_eos=True))
        assert await engine.drain(30)
        assert len([delta async for delta in answer]) == 30
        with pytest.raises(ClosedError):
            await engine.submit([5])
        engine.close()
        with pytest.raises(ClosedError):
            await engine.call(lambda _: None)

    asyncio.run(drain())


def test_closing_tells_those_who_wait(engine: AsyncEngine) -> None:
    async def close() -> None:
        answer = await engine.submit([5], LONG)
        assert not await engine.drain(0)
        await asyncio.to_thread(engine.close)
        with pytest.raises(ClosedError):
            async for _ in answer:
                pass

    asyncio.run(close())
