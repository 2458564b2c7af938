"""Sequences generated together: those that wait, those that live, and one step for all of them."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from itertools import groupby

import torch
from torch import Tensor

from minnow.engine.cache import DecodeAttention, KVCache, PrefillAttention
from minnow.engine.outputs import Delta
from minnow.engine.sampler import sample
from minnow.engine.sequence import Request, Sequence
from minnow.model.transformer import CausalLM


class Batch:
    """Runs sequences to their end, as many at a time as the cache has slots.

    Live sequence i has slot i: rows that finish are replaced by the last one, so a decode step reads the
    cache's first rows as they lie, with nothing gathered. Free slots are filled from the waiting line
    before the next decode.
    """

    def __init__(self, model: CausalLM, cache: KVCache, prefill_tokens: int):
        self._model = model
        self._cache = cache
        self._device = cache.keys.device
        self._waiting = deque[Sequence]()
        self._live: list[Sequence] = []
        self._prefill_tokens = prefill_tokens

    @property
    def done(self) -> bool:
        """Whether every sequence has its end."""
        return not self._waiting and not self._live

    def add(self, sequences: Iterable[Sequence]) -> None:
        """Put sequences at the end of the waiting line."""
        self._waiting.extend(sequences)

    def remove(self, request: Request) -> None:
        """Forget a request's sequences, wherever they are."""
        self._waiting = deque(s for s in self._waiting if s.request is not request)
        for sequence in request.samples:
            if sequence.finish_reason is None:
                sequence.finish_reason = "stop"
        self._retire()

    def recompute(self) -> None:
        """Forget the cache: live sequences will be read again with what they have said so far."""
        self._waiting.extendleft(reversed(self._live))
        self._live = []

    @torch.no_grad()  # not inference_mode: the live training module may cache what it makes here
    def step(self) -> list[tuple[Sequence, Delta]]:
        """Give the next token to the sequences just admitted or, when none can be, to all live ones."""
        if self._waiting and len(self._live) < self._cache.slots:
            rows, logits_BV = self._prefill()
        else:
            rows, logits_BV = list(self._live), self._decode()
        sampled = sample(logits_BV, rows)
        deltas = [
            (row, row.append(token, *sampled.logprobs_of(i, row.params)))
            for i, (row, token) in enumerate(zip(rows, sampled.ids, strict=True))
        ]
        self._retire()
        return deltas

    def _prefill(self) -> tuple[list[Sequence], Tensor]:
        """Admit sequences and read their prompts in one packed row; samples of one prompt share its
        reading."""
        first_slot = len(self._live)
        admitted: list[Sequence] = []
        tokens = 0
        while self._waiting and first_slot + len(admitted) < self._cache.slots:
            tokens += self._waiting[0].num_tokens
            if admitted and tokens > self._prefill_tokens:
                break
            admitted.append(self._waiting.popleft())
        # A sequence that is read again differs from its siblings; fresh ones of a request are the same
        # prompt.
        groups = [list(group) for _, group in groupby(admitted, lambda s: id(s) if s.ids else id(s.request))]
        texts = [group[0].request.prompt_ids + group[0].ids for group in groups]
        lengths = [len(text) for text in texts]
        slots = [first_slot + sum(map(len, groups[:i])) for i in range(len(groups))]

        positions_N = torch.cat([torch.arange(length) for length in lengths]).to(self._device)
        tokens_N = torch.tensor([token for text in texts for token in text], device=self._device)
        attention = PrefillAttention(self._cache, slots, lengths, positions_N)
        hidden_BTD = self._model(tokens_N[None], positions_N[None], attention)
        last_G = torch.tensor(lengths, device=self._device).cumsum(0) - 1
        logits_GV = self._model.logits(hidden_BTD[0, last_G])

        for slot, length, group in zip(slots, lengths, groups, strict=True):
            for offset in range(1, len(group)):
                self._cache.copy(slot, slot + offset, length)
        self._live += admitted
        group_of_row = [i for i, group in enumerate(groups) for _ in group]
        return admitted, logits_GV[torch.tensor(group_of_row, device=self._device)]

    def _decode(self) -> Tensor:
        """Logits [B, V] after every live sequence's last token, which enters the cache."""
        lengths = [row.num_tokens - 1 for row in self._live]
        tokens_B = torch.tensor([row.ids[-1] for row in self._live], device=self._device)
        lengths_B = torch.tensor(lengths, device=self._device)
        attention = DecodeAttention(self._cache, lengths, lengths_B)
        hidden_BTD = self._model(tokens_B[:, None], lengths_B[:, None], attention)
        return self._model.logits(hidden_BTD[:, 0])

    def _retire(self) -> None:
        """Let finished sequences leave; the last live one takes a freed slot."""
        for slot in reversed(range(len(self._live))):
            if self._live[slot].finish_reason is None:
                continue
            last = self._live.pop()
            if slot < len(self._live):
                self._cache.copy(len(self._live), slot, last.num_tokens - 1)
                self._live[slot] = last
