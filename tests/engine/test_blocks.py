"""Random life of the scheduler: no block leaks, none is written by two, and every cached token is the right one.

A dictionary stands in for the cache's memory: slot -> (place, token). It is filled as the runner would fill it.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
from engine_helpers import tiny_tokenizer
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from minnow.engine.blocks import BlockManager, block_key
from minnow.engine.sampling import SamplingParams
from minnow.engine.scheduler import Scheduler
from minnow.engine.sequence import Request, Sequence

SIZE, CONTEXT = 4, 40


class Life(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = BlockManager(14, SIZE)  # a context needs 10
        self.scheduler = Scheduler(self.blocks, max_rows=6, max_step_tokens=11)
        self.memory: dict[int, tuple[int, int]] = {}
        self.requests: dict[int, Request] = {}
        self.weights = 0
        self.added = 0

    @rule(start=st.integers(0, 2), length=st.integers(1, 30), n=st.integers(1, 4), more=st.integers(1, 12))
    def add(self, start: int, length: int, n: int, more: int) -> None:
        """Few different beginnings, so that prefixes are found."""
        prompt = [40 + start] * min(length, 9) + [50 + length % 2] * max(0, length - 9)
        params = SamplingParams(n=n, seed=0)
        self.added += 1
        request = Request(
            id=self.added, prompt_ids=prompt, params=params, seed=0, max_tokens=min(more, CONTEXT - length),
            end_ids=frozenset(),
        )  # fmt: skip
        request.samples.extend(Sequence(request, index, tiny_tokenizer()) for index in range(n))
        self.requests[request.id] = request
        self.scheduler.add(request)

    @rule()
    def step(self) -> None:
        plan = self.scheduler.schedule()
        if self.requests:
            assert plan.chunks  # something always gets on
        assert sum(chunk.count for chunk in plan.chunks) <= 11
        before = dict(self.memory)
        for target, source in plan.copies.items():
            for offset in range(SIZE):
                self.memory[target * SIZE + offset] = before.get(source * SIZE + offset, (-1, -1))
        for chunk in plan.chunks:
            sequence = chunk.sequence
            assert chunk.start == sequence.computed
            for place in range(chunk.start, chunk.start + chunk.count):
                block = sequence.blocks[place // SIZE]
                assert not self.blocks.is_shared(block)
                self.memory[block * SIZE + place % SIZE] = (place + 1000 * self.weights, sequence.tokens[place])
        for chunk in plan.chunks:
            self.scheduler.computed(chunk)
        for chunk in [chunk for chunk in plan.chunks if chunk.sequence.computed == chunk.sequence.num_tokens]:
            for row in self.scheduler.fork(chunk.sequence):
                row.append(60 + (row.index + len(row.ids)) % 3)
                if row.finish_reason is not None:
                    self.scheduler.finish(row)
                if row.request.finished:
                    del self.requests[row.request.id]

    @rule(data=st.data())
    def abort(self, data: Any) -> None:
        if self.requests:
            request = self.requests.pop(data.draw(st.sampled_from(sorted(self.requests))))
            self.scheduler.remove(request)

    @rule()
    def new_weights(self) -> None:
        self.weights += 1
        self.scheduler.forget()

    @invariant()
    def owners_are_counted(self) -> None:
        owned = Counter(block for sequence in self.scheduler.running for block in sequence.blocks)
        assert self.blocks.num_available == self.blocks.num_blocks - len(owned)
        for block in range(self.blocks.num_blocks):
            assert self.blocks._owners[block] == owned[block]
        assert all(not sequence.blocks for sequence in self.scheduler.waiting)
        assert len(self.scheduler.running) <= 6

    @invariant()
    def every_cached_token_is_the_sequences_own(self) -> None:
        for sequence in self.scheduler.running:
            for place in range(sequence.computed):
                slot = sequence.blocks[place // SIZE] * SIZE + place % SIZE
                assert self.memory[slot] == (place + 1000 * self.weights, sequence.tokens[place])

    def teardown(self) -> None:
        for _ in range(2000):
            if not self.requests:
                break
            self.step()
        assert not self.requests
        assert self.blocks.num_available == self.blocks.num_blocks


def test_a_short_life() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=15, stateful_step_count=40, deadline=None))


@pytest.mark.slow
def test_ten_thousand_operations() -> None:
    run_state_machine_as_test(Life, settings=settings(max_examples=120, stateful_step_count=100, deadline=None))


def added(scheduler: Scheduler, number: int, prompt: list[int]) -> Sequence:
    """A request of one endless answer in the waiting line."""
    params, endless = SamplingParams(seed=0), {"max_tokens": 1000, "end_ids": frozenset()}
    request = Request(id=number, prompt_ids=prompt, params=params, seed=0, **endless)  # type: ignore[arg-type]
    request.samples.append(Sequence(request, 0, tiny_tokenizer()))
    scheduler.add(request)
    return request.samples[0]


def stepped(scheduler: Scheduler) -> dict[Sequence, int]:
    """One step; how many tokens of each sequence it took."""
    plan = scheduler.schedule()
    for chunk in plan.chunks:
        scheduler.computed(chunk)
        if chunk.sequence.computed == chunk.sequence.num_tokens:
            for row in scheduler.fork(chunk.sequence):
                row.append(60)
    return {chunk.sequence: chunk.count for chunk in plan.chunks}


def test_where_blocks_run_out_the_youngest_makes_room_and_is_the_next() -> None:
    """Four blocks: two for a prompt of 8, one for one of 4, and one for the next token of only one of them."""
    scheduler = Scheduler(BlockManager(4, SIZE), max_rows=8, max_step_tokens=100)
    old, young = added(scheduler, 1, [5] * 8), added(scheduler, 2, [6] * 4)
    assert stepped(scheduler) == {old: 8, young: 4}
    last = added(scheduler, 3, [7])
    assert stepped(scheduler) == {old: 1}
    assert scheduler.preemptions == 1
    assert list(scheduler.waiting) == [young, last]


def test_who_would_be_sent_away_at_once_waits() -> None:
    """Both prompts of 8 fill the four blocks, and the first one's next token takes another."""
    scheduler = Scheduler(BlockManager(4, SIZE), max_rows=8, max_step_tokens=100)
    old, young = added(scheduler, 1, [5] * 8), added(scheduler, 2, [6] * 8)
    assert [stepped(scheduler) for _ in range(4)] == [{old: 8}, {old: 1}, {old: 1}, {old: 1}]
    assert (scheduler.preemptions, list(scheduler.waiting)) == (0, [young])


def test_who_made_room_is_in_the_step_no_more() -> None:
    """A long prompt is read beside younger answers, whose tokens of the step are planned before its own."""
    scheduler = Scheduler(BlockManager(32, SIZE), max_rows=8, max_step_tokens=8)
    for number, ids in enumerate(([5] * 5, [5] * 4 + [6] * 100, [7] * 2)):
        added(scheduler, number, ids)
    while not scheduler.preemptions:
        planned = stepped(scheduler)
    assert set(planned) == set(scheduler.running)
    assert len(planned) == 2


def test_who_is_held_back_for_a_beginning_keeps_its_place_and_its_age() -> None:
    scheduler = Scheduler(BlockManager(30, SIZE), max_rows=8, max_step_tokens=8)
    prompts = ([5] * 5, [5] * 5, [7] * 9, [8] * 2)
    first, held, long, last = (added(scheduler, number, ids) for number, ids in enumerate(prompts))
    assert stepped(scheduler) == {first: 5, long: 3}
    assert list(scheduler.waiting) == [held, last]
    assert stepped(scheduler) == {first: 1, long: 6, held: 1}  # it has found the beginning
    assert scheduler.running == [first, held, long]


def test_of_a_finished_text_the_end_is_forgotten_first() -> None:
    """Beginnings are what another prompt may share."""
    blocks = BlockManager(4, SIZE)
    scheduler = Scheduler(blocks, max_rows=8, max_step_tokens=100)
    sequence = added(scheduler, 1, list(range(40, 52)))
    stepped(scheduler)
    keys = list(sequence.block_keys)
    assert len(keys) == 3
    scheduler.finish(sequence)
    for _ in range(2):  # the free one, and one that is kept
        blocks.allocate()
    assert [blocks.find(key) is not None for key in keys] == [True, True, False]


def test_an_older_prompt_that_is_long_does_not_halt_a_younger_answer() -> None:
    """It had to wait for the blocks that it shares with another, and is read while the younger one answers."""
    scheduler = Scheduler(BlockManager(30, SIZE), max_rows=8, max_step_tokens=8)
    first, long, young = (added(scheduler, n, ids) for n, ids in enumerate(([5] * 5, [5] * 4 + [6] * 30, [7] * 2)))
    assert stepped(scheduler) == {first: 5, young: 2}
    for _ in range(4):
        assert stepped(scheduler) == {first: 1, young: 1, long: 6}


def test_kept_blocks_go_in_the_order_of_their_last_use() -> None:
    blocks = BlockManager(3, 2)
    keys = [block_key(b"", bytes([i, i])) for i in range(3)]
    for key in keys:
        blocks.remember(blocks.allocate(), key)
    for block in (2, 0, 1):
        blocks.release(block)
    assert [blocks.find(key) for key in keys] == [0, 1, 2]
    found = blocks.find(keys[2])
    assert found is not None
    blocks.share(found)  # used again: the last to go now
    blocks.release(found)
    assert [blocks.allocate() for _ in range(2)] == [0, 1]
    assert [blocks.find(key) for key in keys] == [None, None, 2]


def test_a_key_tells_all_that_came_before() -> None:
    keys = {block_key(parent, content) for parent in (b"", block_key(b"", b"12")) for content in (b"12", b"21")}
    assert len(keys) == 4
