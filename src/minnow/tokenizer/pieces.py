"""Which token every released character came from."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, TypeVar

from minnow.tokenizer.stream import StreamDecoder
from minnow.tokenizer.tokenizer import Tokenizer

T = TypeVar("T")


@dataclass(frozen=True)
class Piece(Generic[T]):
    """Text of one token, or a part of it."""

    text: str
    mark: bool
    """A control token, and not text that spells one."""
    note: T | None
    """What the caller attached to the token; on the first part of its text only."""


class PieceStream(Generic[T]):
    """Splits an answer's text into its tokens' pieces.

    The engine holds text back (half a character, what may become a stop string), so a delta's text need not be its
    tokens' own. Decoded again here without holding back, the same characters come in the same order: what the engine
    has released is a prefix of them, and each character's token is known.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._decoder = StreamDecoder(tokenizer, skip_special_tokens=True)
        self._marks = frozenset(tokenizer.special_ids.values())
        self._vocab_size = tokenizer.vocab_size
        self._queue: deque[Piece[T]] = deque()
        self._released = 0  # characters that the engine has let go and this queue has not

    def push(self, ids: Sequence[int], notes: Sequence[T | None], text: str) -> Iterator[Piece[T]]:
        """Take new tokens with their notes, and the text that the engine released with them."""
        for index, note in zip(ids, notes, strict=True):
            if index in self._marks:
                if rest := self._decoder.finish():
                    self._queue.append(Piece(rest, False, None))
                if mark := self._decoder.push(index):  # tokens that are never shown make no piece
                    self._queue.append(Piece(mark, True, note))
            else:
                # A model's vocabulary may be padded beyond the tokenizer's, with tokens that stand for nothing.
                own = self._decoder.push(index) if index < self._vocab_size else ""
                self._queue.append(Piece(own, False, note))
        self._released += len(text)
        return self._release()

    def _release(self) -> Iterator[Piece[T]]:
        while self._queue and (self._released or not self._queue[0].text):
            piece = self._queue.popleft()
            if len(piece.text) > self._released:
                if piece.mark:  # half a control token is nothing yet
                    self._queue.appendleft(piece)
                    return
                self._queue.appendleft(replace(piece, text=piece.text[self._released :], note=None))
                piece = replace(piece, text=piece.text[: self._released])
            self._released -= len(piece.text)
            yield piece
