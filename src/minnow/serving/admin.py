"""What is not generation: the list of models, health, metrics, reloading weights."""

from __future__ import annotations

from fastapi import APIRouter, Request
from starlette.responses import Response

from minnow.serving.errors import APIError
from minnow.serving.requests import ReloadBody
from minnow.serving.responses import Health, ModelCard, ModelList
from minnow.serving.state import documented, state_of

router = APIRouter(tags=["server"])


@router.get("/v1/models", response_model=None, responses=documented(ModelList))
async def list_models(request: Request) -> ModelList:
    """The models that are served."""
    return {"object": "list", "data": [model.card for model in state_of(request).models]}


@router.get("/v1/models/{name:path}", response_model=None, responses=documented(ModelCard))
async def get_model(name: str, request: Request) -> ModelCard:
    """One of them."""
    return state_of(request).models.get(name).card


@router.get("/health", response_model=None, responses={200: {"model": Health, "description": "It serves"}})
async def health() -> Health:
    """That the server is there; needs no key."""
    return {"status": "ok"}


@router.get("/metrics", responses={200: {"content": {"text/plain": {}}, "description": "Prometheus' text format"}})
async def metrics(request: Request) -> Response:
    """Counters for Prometheus."""
    return Response(state_of(request).metrics.text(), media_type="text/plain; version=0.0.4")


@router.post("/admin/reload", response_model=None, responses=documented(ModelCard))
async def reload(body: ReloadBody, request: Request) -> ModelCard:
    """Load a folder's weights into a served model of the same shape, or in an adapter's place; answers under way go on
    with them.

    Only on a server with an API key: a path on the server is nothing for everybody.
    """
    state = state_of(request)
    if state.config.api_key is None:
        raise APIError(403, "Reloading needs a server with an API key: start it with --api_key.")
    model = state.models.get(body.model)
    try:
        await model.reload(body.folder or model.folder)
    except OSError as error:  # a name too long, no right to read it: the path is the client's
        raise APIError(400, f"The folder cannot be read: {error.strerror or error}", param="folder") from error
    return model.card
