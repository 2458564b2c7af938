"""The engine for asyncio: one worker thread owns it and steps it, coroutines put requests in and await deltas."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict, deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

from minnow.config import UserError
from minnow.engine.engine import Engine
from minnow.engine.grammar import Constraint
from minnow.engine.outputs import Delta
from minnow.engine.prompt import Prompt, ReadyPrompt
from minnow.engine.sampling import SamplingParams
from minnow.out_of_memory import explained, is_out_of_memory
from minnow.tokenizer.chat import Rendered

R = TypeVar("R")

_log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """As many answers as allowed are under way or waiting."""


class ClosedError(Exception):
    """The engine takes no more requests: it drains or has stopped."""


class Answer:
    """The deltas of one request: an asynchronous iterator. `close` it to abort the request.

    Made by `AsyncEngine.submit`; belongs to the event loop that asked.
    """

    def __init__(self, owner: AsyncEngine, samples: int) -> None:
        self.samples = samples
        self.id: int | None = None  # the worker thread sets it
        self.loop = asyncio.get_running_loop()
        self._owner = owner
        self._deltas: asyncio.Queue[Delta | Exception] = asyncio.Queue()
        self._over = False

    def __aiter__(self) -> Answer:
        return self

    async def __anext__(self) -> Delta:
        if self._over and self._deltas.empty():
            raise StopAsyncIteration
        delta = await self._deltas.get()
        if isinstance(delta, Exception):
            raise delta
        return delta

    def put(self, delta: Delta | Exception) -> None:
        """Called in the loop for what the worker made."""
        if self._over:
            return
        self._deltas.put_nowait(delta)
        if isinstance(delta, Exception) or delta.usage is not None:
            self._end()

    def close(self) -> None:
        """Abort the request if it has not its end; harmless when it has. To be called in the answer's loop."""
        if not self._over:
            self._end()
            self._owner._abort(self)

    def _end(self) -> None:
        self._over = True
        self._owner._release(self.samples)


class AsyncEngine:
    """Runs an `Engine` in a thread of its own, so that generation never blocks an event loop.

    max_answers: most answers (samples of all requests together) under way and waiting; one more is a
    `QueueFullError`. While the worker lives nobody else may touch the engine: `call` runs a function between
    two of its steps, `compute` one that takes as long as a step.

    On a CPU compute nothing in a thread that lives on beside it, or the worker is two to three times as slow: compile
    or try the engine in `minnow.cpu.in_passing_thread`.
    """

    def __init__(self, engine: Engine, *, max_answers: int = 256) -> None:
        self.engine = engine
        self.max_answers = max_answers
        self._in_flight = 0
        self._closing = False  # no new requests
        self._stopped = False  # no new commands either
        self._lock = threading.Lock()
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._answers: dict[int, Answer] = {}  # the worker's
        self._computations: deque[Callable[[], None]] = deque()  # the worker's
        self._worker = threading.Thread(target=self._run, name="minnow-engine", daemon=True)
        self._worker.start()

    @property
    def in_flight(self) -> int:
        """Answers under way and waiting."""
        return self._in_flight

    async def submit(self, prompt: Prompt | ReadyPrompt, params: SamplingParams | None = None) -> Answer:
        """Put a request into the waiting line.

        UserError as in `Engine.add`; QueueFullError; ClosedError.
        """
        params = params or SamplingParams()
        self._admit(params.n)
        answer = Answer(self, params.n)
        try:
            if isinstance(prompt, str | Rendered):
                # A long text and pictures take a while, and neither the loop nor the worker may wait for it.
                prompt = await asyncio.to_thread(self.engine.ready, prompt)
            ready = prompt if isinstance(prompt, ReadyPrompt) else self.engine.ready(prompt)
            constraint: Constraint | None = None
            if params.grammar is not None:  # it may take a second to compile, and answers under way would wait for it
                self.engine.require_possible(ready.ids, params)  # nor is it compiled for a request that is refused
                constraint = await asyncio.to_thread(self.engine.constraint, params)

            def add(engine: Engine) -> None:
                answer.id = engine.add(ready, params, constraint)
                self._answers[answer.id] = answer

            await self.call(add)
        except BaseException:  # cancelled while it waited, too
            answer.close()
            raise
        return answer

    async def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> AsyncGenerator[Delta, None]:
        """The deltas of one request as they come; cancelled or closed, it aborts the request. Raises as `submit`."""
        answer = await self.submit(prompt, params)
        try:
            async for delta in answer:
                yield delta
        finally:
            answer.close()

    @contextmanager
    def place(self) -> Iterator[None]:
        """Within it, what is computed for a request counts as one answer. QueueFullError, ClosedError."""
        self._admit(1)
        try:
            yield
        finally:
            self._release(1)

    async def call(self, function: Callable[[Engine], R]) -> R:
        """What `function` makes of the engine, in the worker thread between two steps."""
        command, result = self._command(function)
        self._put(command)
        return await result

    async def compute(self, function: Callable[[Engine], R]) -> R:
        """As `call`, for what takes as long as a step: between two steps runs one such function, so answers go on."""

        def unless_stopped(engine: Engine) -> R:
            if self._stopped:
                raise ClosedError("the engine has stopped")
            return function(engine)

        command, result = self._command(unless_stopped)
        self._put(partial(self._computations.append, command))
        return await result

    async def drain(self, seconds: float | None = None) -> bool:
        """Take no more requests and wait until those under way have their end; False if they had not in time."""
        self._closing = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                while self._in_flight:
                    await asyncio.sleep(0.02)
        return not self._in_flight

    def close(self) -> None:
        """Stop the worker after its step; answers under way get a `ClosedError`."""
        with self._lock:
            self._closing = self._stopped = True
            self._commands.put(None)
        self._worker.join()

    # --- In any thread -----------------------------------------------------------------------------

    def _command(self, function: Callable[[Engine], R]) -> tuple[Callable[[], None], asyncio.Future[R]]:
        """What the worker shall run, and what will hold the result for the caller's loop."""
        loop = asyncio.get_running_loop()
        future: asyncio.Future[R] = loop.create_future()

        def resolve(result: Any, error: BaseException | None) -> None:
            if future.cancelled():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def command() -> None:
            if future.cancelled():  # whoever asked has left
                return
            result, error = None, None
            try:
                result = function(self.engine)
            except Exception as raised:
                error = raised
            with suppress(RuntimeError):  # the loop has closed: nobody waits
                loop.call_soon_threadsafe(resolve, result, error)

        return command, future

    def _put(self, command: Callable[[], None]) -> None:
        with self._lock:  # a command behind the last one would never run
            if self._stopped:
                raise ClosedError("the engine has stopped")
            self._commands.put(command)

    def _admit(self, samples: int) -> None:
        with self._lock:
            if self._closing:
                raise ClosedError("the engine takes no more requests")
            if self._in_flight + samples > self.max_answers:
                raise QueueFullError(
                    f"{self._in_flight} answers are under way or waiting, of {self.max_answers} at most"
                )
            self._in_flight += samples

    def _release(self, samples: int) -> None:
        with self._lock:
            self._in_flight -= samples

    def _abort(self, answer: Answer) -> None:
        def command() -> None:
            if answer.id is not None and self._answers.pop(answer.id, None) is not None:
                self.engine.abort(answer.id)

        self._commands.put(command)

    # --- In the worker -----------------------------------------------------------------------------

    def _run(self) -> None:
        while self._obey():
            try:
                self._deliver(self.engine.step())
            except Exception as error:
                if is_out_of_memory(error):
                    error = explained(error, "answering", ["a smaller --memory_share or --max_answers"])
                    _log.error("%s\nthe answers under way are lost", error)
                else:
                    _log.exception("a step of the engine failed; the answers under way are lost")
                    if isinstance(error, UserError):  # the operator's: what a request got wrong ends that one alone
                        error = RuntimeError(str(error))
                self._fail(error)
        self._fail(ClosedError("the engine has stopped"))
        for computation in self._computations:  # they only tell those who wait
            computation()

    def _obey(self) -> bool:
        """Run the commands that have come, waiting for one if there is nothing else to do; False for the end."""
        while True:
            try:
                command = self._commands.get(block=not (self.engine.has_work or self._computations))
            except Empty:
                break
            if command is None:
                return False
            command()
        if self._computations:
            self._computations.popleft()()
        return True

    def _deliver(self, outcomes: list[tuple[int, Delta | UserError]]) -> None:
        """Hand what a step made over, waking each loop once."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Answer, Delta | Exception]]] = defaultdict(list)
        for request_id, outcome in outcomes:
            answer = self._answers[request_id]
            by_loop[answer.loop].append((answer, outcome))
            if isinstance(outcome, UserError) or outcome.usage is not None:
                del self._answers[request_id]
        for loop, items in by_loop.items():
            with suppress(RuntimeError):  # the loop has closed
                loop.call_soon_threadsafe(_put_all, items)

    def _fail(self, error: Exception) -> None:
        answers, self._answers = self._answers, {}
        for request_id, answer in answers.items():
            with suppress(Exception):  # what broke the step may break this too
                self.engine.abort(request_id)
            with suppress(RuntimeError):
                answer.loop.call_soon_threadsafe(answer.put, error)


def _put_all(items: list[tuple[Answer, Delta | Exception]]) -> None:
    for answer, delta in items:
        answer.put(delta)
