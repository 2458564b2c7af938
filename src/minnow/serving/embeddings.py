"""POST /v1/embeddings: the mean of the last layer's hidden states over a text's tokens, at unit length.

A language model is not trained for this; the vectors of a small one tell topics apart and little more.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Iterator, Sequence
from functools import partial

import numpy as np
from fastapi import APIRouter, Request
from numpy.typing import NDArray

from minnow.engine import Engine
from minnow.engine.hidden import mean_hidden
from minnow.serving.completions import prompt_ids
from minnow.serving.connection import unless_client_leaves
from minnow.serving.errors import APIError
from minnow.serving.models import ServedModel, refusals
from minnow.serving.requests import EmbeddingBody
from minnow.serving.responses import Embedding, Embeddings
from minnow.serving.state import documented, state_of

router = APIRouter(prefix="/v1", tags=["embeddings"])

TOKENS_PER_STEP = 4096
"""Tokens read between two steps of generation."""
MAX_TEXTS = 2048


@router.post("/embeddings", response_model=None, responses=documented(Embeddings))
async def create_embeddings(body: EmbeddingBody, request: Request) -> Embeddings:
    """Mean-pooled hidden states of one or several texts."""
    model = state_of(request).models.get(body.model)
    texts = await asyncio.to_thread(prompt_ids, model, body.input, "input", answered=False)
    if len(texts) > MAX_TEXTS:
        raise APIError(400, f"{len(texts)} texts in one request; at most {MAX_TEXTS}", param="input")
    with refusals(), model.engine.place():
        vectors_ND = await unless_client_leaves(request, _embed(model, texts))
    as_base64 = body.encoding_format == "base64"
    tokens = sum(map(len, texts))
    return {
        "object": "list",
        "data": [_item(i, vector_D, as_base64) for i, vector_D in enumerate(vectors_ND)],
        "model": body.model,
        "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
    }


async def _embed(model: ServedModel, texts: Sequence[list[int]]) -> NDArray[np.float32]:
    """One row a text. Without torch in the event loop's thread, which lives on beside the engine's (see minnow.cpu)."""
    parts = []
    for group in _groups(texts):
        parts.append(await model.engine.compute(partial(_mean_hidden, adapter=model.adapter, texts=group)))
    return np.concatenate(parts)


def _groups(texts: Sequence[list[int]]) -> Iterator[list[list[int]]]:
    """The texts in their order, in groups of about `TOKENS_PER_STEP` tokens."""
    group: list[list[int]] = []
    for text in texts:
        if group and sum(map(len, group)) + len(text) > TOKENS_PER_STEP:
            yield group
            group = []
        group.append(text)
    yield group


def _mean_hidden(engine: Engine, adapter: str | None, texts: Sequence[Sequence[int]]) -> NDArray[np.float32]:
    with engine.adapters.through(adapter, sum(map(len, texts))):
        vectors: NDArray[np.float32] = mean_hidden(engine.model, texts).numpy()
    return vectors


def _item(index: int, vector_D: NDArray[np.float32], as_base64: bool) -> Embedding:
    if as_base64:
        encoded = base64.b64encode(vector_D.tobytes()).decode()
        return {"object": "embedding", "index": index, "embedding": encoded}
    return {"object": "embedding", "index": index, "embedding": vector_D.tolist()}
