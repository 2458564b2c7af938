"""The models of one server, and answers from them."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from minnow.config import UserError
from minnow.cpu import in_passing_thread
from minnow.engine import Delta, Engine, SamplingParams
from minnow.engine.async_engine import Answer, AsyncEngine, ClosedError, QueueFullError
from minnow.engine.prompt import ReadyPrompt
from minnow.model.context import AS_TRAINED, ContextConfig
from minnow.model.pretrained import resolve_model_folder
from minnow.model.quantize import is_quantized, load_quantized
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.serving.errors import APIError
from minnow.serving.metrics import Metrics
from minnow.serving.responses import ModelCard, now
from minnow.tokenizer import Rendered, Tokenizer


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """One model by its name: a whole one, or an adapter beside it."""

    name: str
    folder: Path
    """Where its weights came from."""
    engine: AsyncEngine
    """Of an adapter, its base's."""
    parent: str | None = None
    """Of an adapter, the name of its base; the engine knows the adapter by `name`."""
    stretch: ContextConfig = AS_TRAINED
    """What was done to its context, and is done to that of weights that take its place."""
    created: int = field(default_factory=now)

    @property
    def adapter(self) -> str | None:
        """What `SamplingParams.adapter` must be."""
        return None if self.parent is None else self.name

    @property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer, safe to use in any thread."""
        return self.engine.engine.tokenizer

    @property
    def context(self) -> int:
        """Tokens that prompt and answer may have together."""
        return self.engine.engine.model.config.max_position_embeddings

    @property
    def vocab_size(self) -> int:
        """Rows of its embedding: one more than the largest token id."""
        return self.engine.engine.model.config.vocab_size

    @property
    def card(self) -> ModelCard:
        """What /v1/models says."""
        return {
            "id": self.name,
            "object": "model",
            "created": self.created,
            "owned_by": "minnow",
            "parent": self.parent,
            "max_model_len": self.context,
            "architecture": {
                "input_modalities": ["text"] if self.tokenizer.image_format is None else ["text", "image"],
                "output_modalities": ["text"],
            },
        }

    async def reload(self, folder: str | Path) -> None:
        """Take the weights of another folder of the same tokenizer, and the tokens at which its answers end; answers
        under way go on with them.

        Of the same shape, too, unless it is an adapter. UserError where they do not fit; the model stays as it was
        then. A base's adapters stay on it, whatever its weights.
        """
        if self.parent is None:
            await self._reload_model(folder)
        else:
            read = partial(self.engine.engine.adapters.read, folder)
            layers = await asyncio.to_thread(in_passing_thread, read)

            def put(engine: Engine) -> None:
                engine.adapters.put(self.name, layers)
                engine.weights_updated()

            await self.engine.call(put)

    async def _reload_model(self, folder: str | Path) -> None:
        def load(engine: Engine) -> CausalLM:
            found = resolve_model_folder(folder)
            served = engine.model
            fresh = load_quantized(
                found,
                "int8" if is_quantized(served) else "none",
                dtype=served.compute_dtype,
                device=served.head_weight.device,
            )
            if self.stretch.extend(fresh.config) != engine.model.config:
                raise UserError(f"{folder}: its config.json differs from the served model's: start a server for it")
            if _vision_config(fresh) != _vision_config(served):
                raise UserError(f"{folder}: its vision tower differs from the served model's: start a server for it")
            if Tokenizer.from_pretrained(found).fingerprint != engine.tokenizer.fingerprint:
                raise UserError(f"{folder}: its tokenizer differs from the served model's: start a server for it")
            return fresh

        fresh = await asyncio.to_thread(in_passing_thread, partial(load, self.engine.engine))

        def swap(engine: Engine) -> None:
            engine.model.load_state_dict(fresh.state_dict())
            engine.model.generation_config = fresh.generation_config
            engine.weights_updated()

        await self.engine.call(swap)


class Models:
    """All models of a server."""

    def __init__(self, models: Sequence[ServedModel], metrics: Metrics) -> None:
        self._models = {model.name: model for model in models}
        self.metrics = metrics
        self._decoding = asyncio.Lock()
        for model in models:
            if model.parent is None:  # its adapters' answers are among its own
                metrics.watch_in_flight(model.name, partial(getattr, model.engine, "in_flight"))

    def __iter__(self) -> Iterator[ServedModel]:
        return iter(self._models.values())

    def get(self, name: str) -> ServedModel:
        """The model of that name; APIError 404."""
        if name not in self._models:
            raise APIError(
                404,
                f"The model `{name}` does not exist. Served here: {', '.join(self._models)}",
                param="model",
                code="model_not_found",
            )
        return self._models[name]

    async def ready(self, model: ServedModel, prompt: Rendered) -> ReadyPrompt:
        """The prompt with its pictures decoded. APIError 400 for what is no picture; 429 and 503 as `submit`."""
        ready = model.engine.engine.ready
        if not prompt.images:
            return ready(prompt)
        with refusals(), model.engine.place():  # those that wait for their turn hold files, and must not be many
            async with self._decoding:  # a small file may take 1 GB to decode: one request at a time
                try:
                    return await asyncio.to_thread(ready, prompt)
                except UserError as error:
                    raise APIError(400, f"Invalid value for 'messages': {error}", param="messages") from error

    async def submit(self, model: ServedModel, prompt: ReadyPrompt, params: SamplingParams) -> Generation:
        """Start an answer. APIError 429 when the queue is full, 503 when the server drains; UserError."""
        with refusals():
            answer = await model.engine.submit(prompt, params)
        return Generation(answer, model.name, self.metrics, len(prompt.ids))

    async def submit_all(
        self, model: ServedModel, prompts: Sequence[ReadyPrompt], params: SamplingParams
    ) -> list[Generation]:
        """Start an answer to each prompt, all before the engine's next step. Raises as `submit`; none goes on then."""
        begun: dict[int, Generation] = {}

        async def begin(number: int) -> None:
            begun[number] = await self.submit(model, prompts[number], params)

        try:
            async with asyncio.TaskGroup() as group:
                for number in range(len(prompts)):
                    group.create_task(begin(number))
        except BaseException as error:
            for generation in begun.values():
                generation.close()
            if isinstance(error, BaseExceptionGroup):
                raise error.exceptions[0] from None
            raise
        return [begun[number] for number in range(len(prompts))]


def _vision_config(model: CausalLM) -> VisionConfig | None:
    """The shape of its vision tower; None for a model that only reads."""
    return model.vision if isinstance(model, VisionLanguageModel) else None


@contextmanager
def refusals() -> Iterator[None]:
    """What the engine refuses within it becomes an answer: APIError 429 when the queue is full, 503 in a drain."""
    try:
        yield
    except QueueFullError as error:
        # About the time in which a place becomes free; nobody knows better before the answers end.
        raise APIError(
            429, f"The server is busy: {error}. Try again.", code="queue_full", headers={"Retry-After": "1"}
        ) from error
    except ClosedError as error:
        raise APIError(
            503, "The server is shutting down.", code="shutting_down", headers={"Retry-After": "10"}
        ) from error


class Generation:
    """An `Answer` that is counted in the metrics: iterate for its deltas, close it in the end."""

    def __init__(self, answer: Answer, model: str, metrics: Metrics, prompt_tokens: int) -> None:
        self._answer = answer
        self._model = model
        self._metrics = metrics
        self._prompt_tokens = prompt_tokens
        self._start = time.perf_counter()
        self._tokens = 0
        self._finished = False
        self._closed = False

    def __aiter__(self) -> Generation:
        return self

    async def __anext__(self) -> Delta:
        try:
            delta = await anext(self._answer)
        except Exception:  # the engine failed or gave it up: no client has left
            self._finished = True
            raise
        if delta.cached_tokens is not None:  # now, for the answer may have no end
            self._metrics.prompt_tokens.labels(self._model).inc(self._prompt_tokens)
            self._metrics.cached_tokens.labels(self._model).inc(delta.cached_tokens)
            self._metrics.first_token_seconds.labels(self._model).observe(time.perf_counter() - self._start)
        self._tokens += 1
        if delta.usage is not None:
            self._finished = True
            self._metrics.request_seconds.labels(self._model).observe(time.perf_counter() - self._start)
        return delta

    def close(self) -> None:
        """Abort what is left; may be called again."""
        if self._closed:
            return
        self._closed = True
        self._answer.close()
        self._metrics.generated_tokens.labels(self._model).inc(self._tokens)
        if not self._finished:
            self._metrics.aborted.labels(self._model).inc()
