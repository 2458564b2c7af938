"""POST /v1/completions: texts or token ids continued."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from minnow.engine import Delta
from minnow.serving.completion_answer import CompletionAnswer, Prompt
from minnow.serving.connection import EventStream, unless_client_leaves
from minnow.serving.errors import APIError
from minnow.serving.models import Generation, ServedModel
from minnow.serving.prompts import require_fit
from minnow.serving.requests import CompletionBody, Texts
from minnow.serving.responses import Completion
from minnow.serving.sampling import sampling_params
from minnow.serving.state import documented, state_of
from minnow.tokenizer.bytelevel import valid_unicode

router = APIRouter(prefix="/v1", tags=["completions"])

DEFAULT_MAX_TOKENS = 16
"""OpenAI's, where the request names none."""


@router.post("/completions", response_model=None, responses=documented(Completion, stream=True))
async def create_completion(body: CompletionBody, request: Request) -> Response:
    """Continue one or several prompts, whole or as server-sent events."""
    state = state_of(request)
    model = state.models.get(body.model)
    # The engine writes one token at least. With max_tokens 0, for a prompt's own sake, it is left out of the answer.
    answered = body.max_tokens != 0
    scored = body.logprobs if answered else body.logprobs or 0
    prompts = await asyncio.to_thread(_prompts, model, body.prompt, answered)
    params = sampling_params(
        body,
        state.config,
        model,
        max_tokens=DEFAULT_MAX_TOKENS if body.max_tokens is None else max(body.max_tokens, 1),
        prompts=len(prompts),
        logprobs=body.logprobs is not None,
        top_logprobs=body.logprobs or 0,
        prompt_logprobs=scored if body.echo else None,
    )
    generations = await state.models.submit_all(
        model, [model.engine.engine.ready(prompt.ids) for prompt in prompts], params
    )

    def close() -> None:
        for generation in generations:
            generation.close()

    answer = CompletionAnswer(model, body, prompts, _merged(generations), close)
    if body.stream:
        return EventStream(answer.chunks(), close)
    return JSONResponse(await unless_client_leaves(request, answer.whole()))


def prompt_ids(model: ServedModel, given: Texts, param: str, *, answered: bool = True) -> list[list[int]]:
    """Token ids of every text of a request. APIError 400 for one that does not fit the vocabulary or the context,
    which is the answer's too if they are `answered`."""
    prompts = [model.engine.engine.prompt_ids(text) for text in _texts(given)]
    for prompt in prompts:
        require_fit(len(prompt), model.context, param, answered=answered)
        if max(prompt) >= model.vocab_size:
            raise APIError(
                400, f"Token {max(prompt)} is not in the vocabulary, 0 to {model.vocab_size - 1}", param=param
            )
    return prompts


def _texts(given: Texts) -> Sequence[Any]:
    several = isinstance(given, list) and not isinstance(given[0], int)
    return given if several else [given]


def _prompts(model: ServedModel, given: Texts, answered: bool) -> list[Prompt]:
    """Every prompt of a request. APIError as in `prompt_ids`."""
    prompts = []
    for ids, sent in zip(prompt_ids(model, given, "prompt", answered=answered), _texts(given), strict=True):
        if isinstance(sent, str):
            prompts.append(Prompt(ids=ids, sent=ids[1:], text=valid_unicode(sent)))
        else:
            prompts.append(Prompt(ids=ids, sent=ids, text=model.tokenizer.decode(ids, skip_special_tokens=True)))
    return prompts


async def _merged(generations: Sequence[Generation]) -> AsyncGenerator[tuple[int, Delta], None]:
    """(prompt number, delta) of all generations as they come."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    waiting = {asyncio.ensure_future(anext(generation)): i for i, generation in enumerate(generations)}
    try:
        while waiting:
            done, _ = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            for future in done:
                number = waiting.pop(future)
                try:
                    yield number, future.result()
                except StopAsyncIteration:
                    continue
                waiting[asyncio.ensure_future(anext(generations[number]))] = number
    finally:
        for future in waiting:
            future.cancel()
