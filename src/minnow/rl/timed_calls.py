"""Other people's code side by side, each call under a time limit."""

from __future__ import annotations

import queue
import time
from collections import deque
from collections.abc import Callable, Sequence
from threading import Thread
from typing import TypeVar

from minnow.config import UserError

T = TypeVar("T")


def run_all(calls: Sequence[Callable[[], T]], *, seconds: float, threads: int) -> list[T | BaseException]:
    """What each call returned or raised, in the order of `calls`; TimeoutError where it took more than `seconds`.

    At most `threads` that are within their time run at once, and a call's time begins when it does. Python cannot end a
    thread: one that is late goes on in the background, holds what it holds, and what it brings is ignored. Threads are
    daemons, so that none of them keeps the process from ending.
    """
    finished: queue.SimpleQueue[tuple[int, T | BaseException]] = queue.SimpleQueue()

    def work(place: int, call: Callable[[], T]) -> None:
        try:
            finished.put((place, call()))
        except BaseException as error:  # SystemExit too: it would end this thread alone, and nobody would know
            finished.put((place, error))

    outcomes: dict[int, T | BaseException] = {}
    waiting = deque(enumerate(calls))
    deadlines: dict[int, float] = {}
    while waiting or deadlines:
        while waiting and len(deadlines) < threads:
            place, call = waiting.popleft()
            deadlines[place] = time.monotonic() + seconds
            Thread(target=work, args=(place, call), daemon=True, name=f"timed call {place}").start()
        try:
            place, outcome = finished.get(timeout=max(0.0, min(deadlines.values()) - time.monotonic()))
        except queue.Empty:
            now = time.monotonic()
            for place in [place for place, deadline in deadlines.items() if deadline <= now]:
                del deadlines[place]
                outcomes[place] = TimeoutError(f"it took more than {seconds:g} seconds")
        else:
            if deadlines.pop(place, None) is not None:  # else it is late
                outcomes[place] = outcome
    return [outcomes[place] for place in range(len(calls))]


def check_seconds(setting: str, seconds: float) -> None:
    """UserError unless a time limit is one: more than nothing, and a day at most."""
    if not 0 < seconds <= 86_400:
        raise UserError(f"{setting} is {seconds:g}: it is a time limit in seconds, above 0 and at most a day (86400)")


def where(error: BaseException) -> str:
    """An exception in one line: its type, what it says, and the line of code that raised it."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})" if trace is not None else ""
    return f"{type(error).__name__}: {error}{place}"
