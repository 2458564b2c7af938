"""Cutting a conversation that is longer than a row, so that no supervised token is lost and none counts twice."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np

from minnow.tokenizer.chat import Rendered

Piece = tuple[np.ndarray, np.ndarray]


def cut_conversation(rendered: Rendered, sequence_length: int) -> tuple[list[Piece], int]:
    """Cut into (ids, weights) of at most `sequence_length` + 1 tokens; also count the turns too long for a row.

    A turn is a user message with all that answers it; what stands before the first, the system message, opens every
    piece. The first piece takes the turns that fit. Each further one takes new turns up to half of its room, at
    least one, and before them, without loss, as many earlier turns as then fit: so a turn is learnt from at least
    half a row of context where there is that much.

    A turn that does not fit with the system message is cut inside: its head stands as above, and the rest goes on in
    windows that read straight on, half new and half repeated without loss. Every token with loss is in exactly one
    piece; pieces without one are left out.
    """
    ids, weights = rendered.ids, rendered.weights
    room_tokens = sequence_length + 1
    if len(ids) <= room_tokens:
        return [(ids, weights)], 0
    turns = list(pairwise([*rendered.turn_starts.tolist(), len(ids)]))
    system = slice(0, turns[0][0])
    room = room_tokens - system.stop
    pieces: list[Piece] = []
    too_long = 0

    def add(context: int, new: int, stop: int) -> None:
        """The system message and tokens context..stop, with loss from `new` on."""
        parts = [weights[new:stop]]
        if weights[new:stop].any():
            zeros = np.zeros(system.stop + new - context, weights.dtype)
            pieces.append((np.concatenate([ids[system], ids[context:stop]]), np.concatenate([zeros, *parts])))

    k = 0
    while k < len(turns):
        start, stop = turns[k]
        if stop - start > room:
            too_long += 1
            head = max(room, 0)
            add(start, start, start + head)
            pieces += _windows(ids, weights, start + head, stop, room_tokens)
            k += 1
            continue
        limit = room if k == 0 else room // 2
        last = k
        while last + 1 < len(turns) and turns[last + 1][1] - start <= limit:
            last += 1
        first = k
        while first > 0 and turns[last][1] - turns[first - 1][0] <= room:
            first -= 1
        add(turns[first][0], start, turns[last][1])
        k = last + 1
    return pieces, too_long


def _windows(ids: np.ndarray, weights: np.ndarray, start: int, stop: int, size: int) -> Iterator[Piece]:
    """Windows of `size` tokens that together give loss to start..stop once; each has context before its first."""
    while True:
        supervised = start + np.flatnonzero(weights[start:stop])
        if not len(supervised):
            return
        new = int(supervised[0])
        end = min(new + max(size // 2, 1), stop)
        begin = max(0, end - size)
        window = weights[begin:end].copy()
        window[: new - begin] = 0
        yield ids[begin:end], window
        start = end
