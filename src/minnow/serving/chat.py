"""POST /v1/chat/completions."""

from __future__ import annotations

import asyncio

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse
from starlette.responses import Response

from minnow.engine import SamplingParams
from minnow.serving.chat_answer import ChatAnswer
from minnow.serving.connection import EventStream, unless_client_leaves
from minnow.serving.constraints import answer_grammar, grammar_at_fault
from minnow.serving.models import ServedModel
from minnow.serving.prompts import chat_prompt, require_fit
from minnow.serving.requests import ChatBody
from minnow.serving.responses import ChatCompletion
from minnow.serving.sampling import sampling_params
from minnow.serving.state import ServerState, documented, state_of
from minnow.tokenizer.chat import Rendered

router = APIRouter(prefix="/v1", tags=["chat"])


@router.post("/chat/completions", response_model=None, responses=documented(ChatCompletion, stream=True))
async def create_chat_completion(body: ChatBody, request: Request) -> Response:
    """Answer a conversation, whole or as server-sent events."""
    state = state_of(request)
    model = state.models.get(body.model)
    # Long prompts and schemas take a while: in another thread the loop goes on serving.
    rendered, params = await asyncio.to_thread(_prepare, state, model, body)
    prompt = await state.models.ready(model, rendered)
    with grammar_at_fault(body):
        generation = await state.models.submit(model, prompt, params)
        answer = ChatAnswer(model, body, prompt.ids, generation)
        if body.stream:
            return EventStream(answer.chunks(), answer.close)
        return JSONResponse(await unless_client_leaves(request, answer.whole()))


def _prepare(state: ServerState, model: ServedModel, body: ChatBody) -> tuple[Rendered, SamplingParams]:
    rendered = chat_prompt(model.tokenizer, body)
    require_fit(len(rendered.ids), model.context, "messages")
    params = sampling_params(
        body,
        state.config,
        model,
        max_tokens=body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens,
        logprobs=bool(body.logprobs),
        top_logprobs=body.top_logprobs or 0,
        grammar=answer_grammar(model.tokenizer, body),
    )
    return rendered, params
