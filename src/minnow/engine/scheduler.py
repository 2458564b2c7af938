"""What goes into the next step: continuous batching under a budget of tokens."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field

from minnow.engine.blocks import BlockManager, block_key
from minnow.engine.sequence import Request, Sequence


@dataclass(frozen=True)
class Chunk:
    """Tokens `start` to `start + count` of a sequence are computed in this step; those before are in the cache."""

    sequence: Sequence
    start: int
    count: int

    @property
    def reaches_end(self) -> bool:
        """Whether the step gives the logits after the sequence's last token."""
        return self.start + self.count == self.sequence.num_tokens


@dataclass(frozen=True)
class Plan:
    """One step. Blocks are copied first; every chunk has blocks for its tokens."""

    chunks: list[Chunk]
    copies: dict[int, int] = field(default_factory=dict)
    """New block -> the shared block whose content it starts with."""


@dataclass(frozen=True)
class _Cached:
    """What the cache holds of a waiting sequence."""

    blocks: list[int]
    keys: list[bytes]
    next_key: bytes | None
    """Of the first full block that is missing."""


class Scheduler:
    """A waiting line, the running sequences, and the blocks they own.

    A step takes at most `max_step_tokens` tokens: first one for every sequence that is past its prompt, then
    prompts in pieces, the oldest first, so that a long prompt slows the others down but never halts them. A prompt that
    begins like one of this step waits for the next, where it finds the beginning in the cache. When
    blocks run out the youngest running sequence gives its own back and waits; it will be read again from what
    it has said (recomputation). Every sequence alone fits the cache, so the oldest always gets on.
    """

    def __init__(self, blocks: BlockManager, max_rows: int, max_step_tokens: int):
        self.blocks = blocks
        self.running: list[Sequence] = []  # oldest first
        self.waiting: deque[Sequence] = deque()
        self.preemptions = 0
        self._max_rows = max_rows
        self._max_step_tokens = max_step_tokens

    def add(self, request: Request) -> None:
        """Put a request at the end of the line. Its first sample reads the prompt for all (see `fork`)."""
        self.waiting.append(request.samples[0])

    def remove(self, request: Request) -> None:
        """Forget a request's samples and free their blocks."""
        self.waiting = deque(s for s in self.waiting if s.request is not request)
        for sequence in [s for s in self.running if s.request is request]:
            self.finish(sequence)

    def finish(self, sequence: Sequence) -> None:
        """A running sequence has its end."""
        self.running.remove(sequence)
        self._free(sequence)

    def forget(self) -> None:
        """The weights changed: what is cached is worth nothing, and running sequences are read again."""
        for sequence in reversed(self.running):
            self._free(sequence)
            self.waiting.appendleft(sequence)
        self.running = []
        for sequence in self.waiting:
            if not sequence.request.samples[0].ids:  # else they have been handed out
                sequence.request.forget_prompt_logprobs()
        self.blocks.forget_contents()

    def fork(self, leader: Sequence) -> list[Sequence]:
        """Samples that share the prompt which `leader` just read: itself and its siblings as far as rows go.

        They own its blocks together; whoever writes into a shared one gets a copy first. Siblings beyond the
        rows wait, and will find the prompt's full blocks by their content.
        """
        followers, room = leader.take_followers(), self._max_rows - len(self.running)
        rows = [leader, *followers[:room]]
        for sibling in rows[1:]:
            sibling.blocks, sibling.block_keys = list(leader.blocks), list(leader.block_keys)
            sibling.computed = leader.computed
            for block in sibling.blocks:
                self.blocks.share(block)
        self.waiting.extendleft(reversed(followers[room:]))
        if len(rows) > 1:
            self.running = sorted([*self.running, *rows[1:]], key=lambda s: s.order)
        return rows

    def computed(self, chunk: Chunk) -> None:
        """A chunk's keys and values are in the cache now: its full blocks can be found by their content."""
        sequence, size = chunk.sequence, self.blocks.block_size
        sequence.computed += chunk.count
        for index in range(len(sequence.block_keys), sequence.computed // size):
            parent = sequence.block_keys[-1] if sequence.block_keys else sequence.first_parent
            sequence.block_keys.append(block_key(parent, sequence.content(index * size, (index + 1) * size)))
            self.blocks.remember(sequence.blocks[index], sequence.block_keys[index])

    def schedule(self) -> Plan:
        """Choose the tokens of the next step and give them blocks."""
        counts: dict[Sequence, int] = {}
        copies: dict[int, int] = {}
        budget = self._max_step_tokens
        preempted = False
        decoding_first = sorted(self.running, key=lambda s: s.num_tokens - s.computed > 1)
        for sequence in decoding_first:
            if budget == 0 or (preempted and sequence not in self.running):  # given up for an older one
                continue
            count = min(sequence.num_tokens - sequence.computed, budget)
            while not self._give_blocks(sequence, count, copies):
                victim = self.running[-1]
                budget += counts.pop(victim, 0)
                self._preempt(victim)
                preempted = True
                if victim is sequence:
                    break
            else:
                counts[sequence] = count
                budget -= count
        being_read: set[bytes] = set()
        held: list[Sequence] = []
        while self.waiting and not preempted and budget and len(self.running) < self._max_rows:
            sequence = self.waiting.popleft()
            cached = self._cached(sequence)
            if cached.next_key in being_read:  # in the next step it finds what another reads in this one
                held.append(sequence)
                continue
            if not self._admit(sequence, cached):
                self.waiting.appendleft(sequence)
                break
            if cached.next_key is not None:
                being_read.add(cached.next_key)
            count = min(sequence.num_tokens - sequence.computed, budget)
            given = self._give_blocks(sequence, count, copies)
            assert given
            counts[sequence] = count
            budget -= count
        self.waiting.extendleft(reversed(held))
        return Plan([Chunk(sequence, sequence.computed, count) for sequence, count in counts.items()], copies)

    def _cached(self, sequence: Sequence) -> _Cached:
        size = self.blocks.block_size
        found: list[int] = []
        keys: list[bytes] = []
        for start in range(0, sequence.skippable // size * size, size):
            key = block_key(keys[-1] if keys else sequence.first_parent, sequence.content(start, start + size))
            block = self.blocks.find(key)
            if block is None:
                return _Cached(found, keys, key)
            found.append(block)
            keys.append(key)
        return _Cached(found, keys, None)

    def _admit(self, sequence: Sequence, cached: _Cached) -> bool:
        """Let a sequence run if its text fits beside those running; it starts with what is cached of it."""
        found, keys, size = cached.blocks, cached.keys, self.blocks.block_size
        for block in found:
            self.blocks.share(block)
        # One block to spare for each that runs, lest the newcomer be sent away again at once.
        needed = self.blocks.blocks_for(sequence.num_tokens) - len(found) + len(self.running)
        if needed > self.blocks.num_available:
            for block in reversed(found):
                self.blocks.release(block)
            return False
        sequence.blocks, sequence.block_keys, sequence.computed = found, keys, len(found) * size
        sequence.note_cached(sequence.computed)
        self.running.append(sequence)
        self.running.sort(key=lambda s: s.order)
        return True

    def _give_blocks(self, sequence: Sequence, count: int, copies: dict[int, int]) -> bool:
        """Blocks of its own for the sequence's next `count` tokens; False where there are not enough."""
        size, blocks = self.blocks.block_size, sequence.blocks
        missing = self.blocks.blocks_for(sequence.computed + count) - len(blocks)
        first = sequence.computed // size
        shared = first < len(blocks) and self.blocks.is_shared(blocks[first])
        if missing + shared > self.blocks.num_available:
            return False
        if shared:
            copy = self.blocks.allocate()
            copies[copy] = blocks[first]
            self.blocks.release(blocks[first])
            blocks[first] = copy
        blocks.extend(self.blocks.allocate() for _ in range(missing))
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self.preemptions += 1
        self.running.remove(sequence)
        self._free(sequence)
        self.waiting.appendleft(sequence)

    def _free(self, sequence: Sequence) -> None:
        # The last block first: of what is kept, the ends of texts are the first to go, and beginnings are shared.
        for block in reversed(sequence.blocks):
            self.blocks.release(block)
        sequence.blocks, sequence.block_keys, sequence.computed = [], [], 0
