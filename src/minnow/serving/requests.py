"""What clients may send: OpenAI's fields, and the few that vLLM's clients add.

Unknown fields are errors, as at OpenAI: a misspelt option that did nothing would be worse. Fields that only mean
something at OpenAI's own service are accepted and have no effect (`_Body`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
# A list is read to its first mistake: a body of a million of them would keep the event loop busy for minutes.
TokenIds = Annotated[list[_TokenId], Field(min_length=1, fail_fast=True)]
_MAX_KEYS = 100
"""Fields of one object at most, known or not."""
_MAX_BIASES = 1000
"""Tokens of a `logit_bias` at most."""


def _misfit(param: str, message: str) -> PydanticCustomError:
    """Fields that do not go together; `param` is the one to change."""
    return PydanticCustomError("misfit", "{message}", {"message": message, "param": param})


class _Strict(BaseModel):
    """An object whose fields are all known."""

    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _not_too_many(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > _MAX_KEYS:
            raise ValueError(f"it has {len(given)} fields, more than anybody knows")
        return given


class _Body(_Strict):
    model: str
    """A name that /v1/models lists."""
    user: str | None = None
    """Accepted, without effect; so are the fields below it."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: Any = None


class StreamOptions(_Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    """End with a chunk that counts the tokens."""
    include_obfuscation: bool | None = None
    """Accepted, without effect."""


class GenerationBody(_Body):
    """What chat and text completions have in common."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1, description="0 is the likeliest token")
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(max_length=4, fail_fast=True)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's additions
    top_k: int | None = Field(None, ge=-1, description="0 and -1 turn it off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: list[_TokenId] | None = Field(None, max_length=1000, fail_fast=True)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = Field(None, description="log-probabilities then come one for each id")
    skip_special_tokens: Literal[True] | None = None

    @field_validator("logit_bias", mode="before")
    @classmethod
    def _not_too_many_biases(cls, given: Any) -> Any:
        if isinstance(given, dict) and len(given) > _MAX_BIASES:
            raise ValueError(f"{len(given)} tokens; this server takes {_MAX_BIASES}")
        return given

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise _misfit("stream_options", "stream_options is only allowed when stream is true")
        return self


# --- Chat -----------------------------------------------------------------------------------------


class _Part(BaseModel):
    """Structures inside a body; clients send back what servers sent them, so unknown fields are left out."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)


_Contents = str | Annotated[list["TextPart"], Field(fail_fast=True)]


class TextPart(_Part):
    """A piece of a message's content; text is the only kind so far."""

    type: Literal["text"]
    text: str


class CalledFunction(_Part):
    """What an assistant called earlier."""

    name: str
    arguments: str
    """A JSON object, as text."""


class MessageToolCall(_Part):
    """A call in an assistant's earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(_Part):
    """Instructions."""

    role: Literal["system", "developer"]
    content: _Contents


class UserMessage(_Part):
    """What the user says."""

    role: Literal["user"]
    content: _Contents


class AssistantMessage(_Part):
    """What the assistant said or called."""

    role: Literal["assistant"]
    content: _Contents | None = None
    reasoning_content: str | None = None
    tool_calls: list[MessageToolCall] | None = Field(None, fail_fast=True)

    @model_validator(mode="after")
    def _says_something(self) -> AssistantMessage:
        if self.content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolMessage(_Part):
    """What a tool gave back."""

    role: Literal["tool"]
    content: _Contents
    tool_call_id: str | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


class Function(_Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments."""
    strict: bool | None = None
    """Accepted, without effect: arguments always follow the schema."""


class Tool(_Strict):
    """Something the model may use; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(_Part):
    """A function of `tools`."""

    name: str


class NamedToolChoice(_Part):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class TextFormat(_Part):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(_Part):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(_Part):
    """A named JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted, without effect: answers always follow the schema."""


class JsonSchemaFormat(_Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatTemplateKwargs(_Strict):
    """Switches of the chat template."""

    enable_thinking: bool = False
    """Let the model reason before it answers."""


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: list[Tool] | None = Field(None, max_length=128, fail_fast=True)
    tool_choice: Literal["none", "auto", "required"] | NamedToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Anything but none lets the model reason; `chat_template_kwargs` wins."""
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: Literal[True] | None = None
    """Accepted, without effect, for it cannot change a text; so are the fields below it."""
    modalities: list[Literal["text"]] | None = Field(None, max_length=1)
    verbosity: str | None = None
    prediction: Any = None
    moderation: Any = None
    function_call: Literal["none"] | None = None
    audio: None = Field(None, description="not supported: answers are text")
    functions: None = Field(None, description="not supported: tools are their successor")
    web_search_options: None = Field(None, description="not supported: nothing here reaches the web")

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        if self.top_logprobs is not None and not self.logprobs:
            raise _misfit("top_logprobs", "top_logprobs is only allowed when logprobs is true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise _misfit("tools", "two functions of tools have the same name")
        if self.tool_choice in ("auto", "required") and not names:
            raise _misfit("tool_choice", "tool_choice is only allowed when tools are given")
        if isinstance(self.tool_choice, NamedToolChoice) and self.tool_choice.function.name not in names:
            named = self.tool_choice.function.name
            raise _misfit("tool_choice", f"tool_choice names {named!r}, which is not among the tools")
        called = False  # whether the messages so far end in calls, or in their results
        for message in self.messages:
            if isinstance(message, ToolMessage) and not called:
                raise _misfit("messages", "a message of role tool must follow an assistant's message with tool_calls")
            called = isinstance(message, ToolMessage) or bool(getattr(message, "tool_calls", None))
        return self

    @property
    def thinking(self) -> bool:
        """Whether the model reasons before it answers."""
        if self.chat_template_kwargs is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.reasoning_effort not in (None, "none")

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that may be called: none of them with tool_choice none."""
        return [] if self.tool_choice == "none" else self.tools or []


# --- The other endpoints --------------------------------------------------------------------------

_Several = Field(min_length=1, fail_fast=True)
Texts = str | TokenIds | Annotated[list[str], _Several] | Annotated[list[TokenIds], _Several]


class CompletionBody(GenerationBody):
    """POST /v1/completions. A text is read as the start of a document; token ids are taken as they are."""

    prompt: Texts
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, description="only equal to n")
    echo: Literal[False] | None = None
    suffix: None = None

    @model_validator(mode="after")
    def _no_best_of(self) -> CompletionBody:
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise _misfit("best_of", "best_of other than n is not supported")
        return self


class EmbeddingBody(_Body):
    """POST /v1/embeddings."""

    input: Texts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = Field(None, description="not supported: a vector has the model's hidden size")

    @field_validator("input")
    @classmethod
    def _no_empty_text(cls, given: Texts) -> Texts:
        if given == "" or (isinstance(given, list) and "" in given):
            raise ValueError("an empty text has no embedding")
        return given


class ReloadBody(_Strict):
    """POST /admin/reload."""

    model: str
    """A name that /v1/models lists."""
    folder: str | None = None
    """Model, adapter or run folder on the server to read the weights from; by default the one the model came from."""
