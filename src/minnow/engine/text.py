"""Tokens to text, one token at a time."""

from __future__ import annotations

import codecs
from collections.abc import Sequence


class TextStream:
    """Joins the bytes of tokens into text, releasing only what is certain.

    Half a character is held back until its other half comes, and so is a tail that may become a stop string.
    Bytes that can never be a character become U+FFFD.
    """

    def __init__(self, stop: Sequence[str] = ()):
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        self._stop = stop
        self._held = ""
        self.stopped = False
        """Whether a stop string came; the text ends before it."""

    def push(self, token: bytes, *, may_stop: bool = True) -> str:
        """The text that became certain with `token`."""
        self._held += self._decoder.decode(token)
        if not may_stop:
            return self._release(len(self._held))
        found = [at for at in (self._held.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped = True
            return self._release(min(found))
        return self._release(len(self._held) - self._open_tail())

    def finish(self) -> str:
        """What was held back for a stop string that did not come; half a character is left out."""
        return "" if self.stopped else self._release(len(self._held))

    def _release(self, length: int) -> str:
        text, self._held = self._held[:length], self._held[length:]
        return text

    def _open_tail(self) -> int:
        """Length of the longest end of the held text that begins a stop string."""
        longest = max((len(stop) for stop in self._stop), default=1) - 1
        for length in range(min(longest, len(self._held)), 0, -1):
            tail = self._held[-length:]
            if any(stop.startswith(tail) for stop in self._stop):
                return length
        return 0
