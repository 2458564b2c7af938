"""What the server answers, field by field as OpenAI does: plain dicts that mypy checks and OpenAPI shows."""

from __future__ import annotations

import secrets
import time
from typing import Literal, NotRequired

from typing_extensions import TypedDict

from minnow import __version__

FINGERPRINT = f"minnow-{__version__}"
"""What stands in `system_fingerprint`."""

FinishReason = Literal["stop", "length", "tool_calls"]


def new_id(prefix: str) -> str:
    """`chatcmpl-` and the like, with 24 random hexadecimal digits."""
    return f"{prefix}{secrets.token_hex(12)}"


def now() -> int:
    """Unix time in whole seconds."""
    return int(time.time())


class CompletionTokensDetails(TypedDict):
    """Part of `Usage`."""

    reasoning_tokens: int


class PromptTokensDetails(TypedDict):
    """Part of `Usage`."""

    cached_tokens: int


class Usage(TypedDict):
    """Tokens read and written; every sample of a prompt writes its own, the prompt counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: NotRequired[CompletionTokensDetails]


class TopLogprob(TypedDict):
    """A token that might have come."""

    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TypedDict):
    """A token of the answer, and the likeliest ones in its place."""

    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log-probabilities of the content's tokens, from the model's own distribution."""

    content: list[TokenLogprob]
    refusal: None


class CalledFunction(TypedDict):
    """A function and its arguments (JSON text)."""

    name: str
    arguments: str


class ToolCall(TypedDict):
    """A call the assistant makes."""

    id: str
    type: Literal["function"]
    function: CalledFunction


class AssistantMessage(TypedDict):
    """The answer."""

    role: Literal["assistant"]
    content: str | None
    refusal: None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[ToolCall]]


class ChatChoice(TypedDict):
    """One of the `n` answers."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason
    token_ids: NotRequired[list[int]]


class ChatCompletion(TypedDict):
    """The answer to a chat request that does not stream."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str
    prompt_token_ids: NotRequired[list[int]]


class FunctionDelta(TypedDict):
    """The name comes first and once, the arguments piece by piece."""

    name: NotRequired[str]
    arguments: str


class ToolCallDelta(TypedDict):
    """What is new of call number `index`."""

    index: int
    id: NotRequired[str]
    type: NotRequired[Literal["function"]]
    function: FunctionDelta


class ChatDelta(TypedDict, total=False):
    """What is new of an answer."""

    role: Literal["assistant"]
    content: str | None
    """Null at the beginning of an answer that can only be calls."""
    refusal: None
    reasoning_content: str
    tool_calls: list[ToolCallDelta]


class ChatChunkChoice(TypedDict):
    """What is new of answer number `index`."""

    index: int
    delta: ChatDelta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None
    token_ids: NotRequired[list[int]]


class ChatChunk(TypedDict):
    """One event of a chat stream."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    system_fingerprint: str
    usage: NotRequired[Usage | None]
    prompt_token_ids: NotRequired[list[int]]


class CompletionLogprobs(TypedDict):
    """Lists of the same length, one item a token."""

    tokens: list[str]
    token_logprobs: list[float | None]
    """Null for the first token of a prompt."""
    top_logprobs: list[dict[str, float] | None] | None
    """The likeliest ones, and the token that came."""
    text_offset: list[int]
    """Characters before each token, from the prompt's start."""


class CompletionChoice(TypedDict):
    """One continuation; in a stream, what is new of it."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    token_ids: NotRequired[list[int]]
    prompt_token_ids: NotRequired[list[int]]


class Completion(TypedDict):
    """The answer to a completion request, and every event of its stream."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    system_fingerprint: str
    usage: NotRequired[Usage | None]


class Embedding(TypedDict):
    """The vector of one input."""

    object: Literal["embedding"]
    index: int
    embedding: list[float] | str
    """Numbers, or little-endian float32 in base64."""


class EmbeddingUsage(TypedDict):
    """Tokens read."""

    prompt_tokens: int
    total_tokens: int


class Embeddings(TypedDict):
    """The answer to an embedding request."""

    object: Literal["list"]
    data: list[Embedding]
    model: str
    usage: EmbeddingUsage


class Architecture(TypedDict):
    """What goes in and out, as OpenRouter and the Hugging Face router list it."""

    input_modalities: list[Literal["text", "image"]]
    """With image: the model looks at the pictures of a chat request."""
    output_modalities: list[Literal["text"]]


class ModelCard(TypedDict):
    """A model that is served."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    parent: str | None
    """Of an adapter, the model that it stands beside."""
    max_model_len: int
    """Context in tokens, prompt and answer together."""
    architecture: Architecture


class ModelList(TypedDict):
    """All models that are served."""

    object: Literal["list"]
    data: list[ModelCard]


class Health(TypedDict):
    """That the server is there."""

    status: Literal["ok"]


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> Usage:
    """A `Usage` with its sum."""
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }
