"""Stop strings in text that comes in pieces."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """Lets text through up to the first stop string, holding back a tail that may become one."""

    def __init__(self, stop: Sequence[str]):
        self._stop = stop
        self._held = ""
        self.found = False
        """Whether a stop string came; the text ends before it."""

    def push(self, text: str, *, may_stop: bool = True) -> str:
        """The text that became certain with this piece. A stop string counts where it ends in a piece that may stop."""
        if not self._stop:
            return text
        before = len(self._held)
        self._held += text
        found = [at for stop in self._stop if (at := self._held.find(stop, max(0, before + 1 - len(stop)))) >= 0]
        if found and may_stop:
            self.found = True
            return self._release(min(found))
        return self._release(len(self._held) - self._open_tail())

    def finish(self) -> str:
        """What was held back for a stop string that did not come."""
        return "" if self.found else self._release(len(self._held))

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
