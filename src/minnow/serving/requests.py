"""What clients may send: OpenAI's fields, and the few that vLLM's clients add.

Unknown fields are errors, as at OpenAI: a misspelt option that did nothing would be worse. Fields that only mean
something at OpenAI's own service are accepted and have no effect; what would change the answer and is not to be had
here is refused by name (`refused`).
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from minnow.serving.messages import ChatMessage, require_calls_before_results, require_few_pictures
from minnow.serving.validation import Items, Part, Strict, at_fault, at_most, refused

_Text = Annotated[str, Field(min_length=1)]
_TokenId = Annotated[int, Field(ge=0, lt=2**31)]
TokenIds = Annotated[Items[_TokenId], Field(min_length=1)]

MAX_STOPS = 16
"""Most stop strings; OpenAI takes 4, but tasks of lm-evaluation-harness have up to 7."""
MAX_BIASES = 1024
"""Most keys of `logit_bias`; OpenAI takes 300."""
_Bias = Annotated[float, Field(ge=-100, le=100)]
_LogitBias = Annotated[dict[str, _Bias], Field(max_length=MAX_BIASES), at_most(MAX_BIASES)]


class _Body(Strict):
    model: str
    """A name that /v1/models lists."""
    user: str | None = None
    """Accepted, without effect; so are the fields below it."""
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_options: dict[str, Any] | None = None
    prompt_cache_retention: str | None = None


class StreamOptions(Strict):
    """What a stream holds besides the answer."""

    include_usage: bool = False
    """End with a chunk that counts the tokens."""
    include_obfuscation: bool | None = None
    """Accepted, without effect."""


class GenerationBody(_Body):
    """What chat and text completions have in common."""

    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, ge=0, le=1, description="0 takes the likeliest token")
    n: int | None = Field(None, ge=1, le=128)
    seed: int | None = Field(None, ge=-(2**63), lt=2**64)
    stop: _Text | Annotated[Items[_Text], Field(max_length=MAX_STOPS)] | None = None
    max_tokens: int | None = Field(None, ge=1)
    presence_penalty: float | None = Field(None, ge=-2, le=2)
    frequency_penalty: float | None = Field(None, ge=-2, le=2)
    logit_bias: _LogitBias | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    # vLLM's additions
    top_k: int | None = Field(None, ge=-1, description="0 and -1 turn it off")
    min_p: float | None = Field(None, ge=0, le=1)
    repetition_penalty: float | None = Field(None, ge=0.01, le=100)
    min_tokens: int | None = Field(None, ge=0)
    stop_token_ids: Items[_TokenId] | None = Field(None, max_length=1000)
    ignore_eos: bool | None = None
    return_token_ids: bool | None = Field(None, description="ids of the prompt, and of each answer beside its text")
    skip_special_tokens: Annotated[Literal[True] | None, refused("control tokens are never part of a text", True)] = (
        None
    )

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> GenerationBody:
        if self.stream_options is not None and not self.stream:
            raise at_fault("stream_options", "only allowed when stream is true")
        return self


# --- Chat -----------------------------------------------------------------------------------------


class Function(Strict):
    """A function that the model may call."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    """JSON schema of its arguments."""
    strict: bool | None = None
    """Accepted, without effect: arguments always follow the schema."""


class Tool(Strict):
    """Something the model may use; functions are the only kind."""

    type: Literal["function"]
    function: Function


class FunctionName(Part):
    """A function of `tools`."""

    name: str


class NamedToolChoice(Part):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class AllowedTools(Part):
    """Some of `tools`, and whether one of them must be called."""

    mode: Literal["auto", "required"]
    tools: Items[NamedToolChoice] = Field(min_length=1)


class AllowedToolsChoice(Part):
    """The model reads of all tools and may call these only."""

    type: Literal["allowed_tools"]
    allowed_tools: AllowedTools


ToolChoice = (  # the objects first: of an object that is wrong, the error is theirs
    Annotated[NamedToolChoice | AllowedToolsChoice, Field(discriminator="type")] | Literal["none", "auto", "required"]
)


class TextFormat(Part):
    """No constraint."""

    type: Literal["text"]


class JsonObjectFormat(Part):
    """Any JSON object."""

    type: Literal["json_object"]


class JsonSchema(Part):
    """A named JSON schema."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    """Accepted, without effect: answers always follow the schema."""


class JsonSchemaFormat(Part):
    """JSON that follows a schema."""

    type: Literal["json_schema"]
    json_schema: JsonSchema


ResponseFormat = Annotated[TextFormat | JsonObjectFormat | JsonSchemaFormat, Field(discriminator="type")]


class ChatTemplateKwargs(Strict):
    """Switches of the chat template."""

    enable_thinking: bool = False
    """Let the model reason before it answers."""


class Moderation(Strict):
    """Accepted, without effect, as long as no answer depends on it."""

    model: str | None = None
    policy: Annotated[None, refused("this server moderates nothing")] = None


class ChatBody(GenerationBody):
    """POST /v1/chat/completions."""

    messages: Items[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    tools: Items[Tool] | None = Field(None, max_length=128)
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    """Anything but none lets the model reason; `chat_template_kwargs` wins."""
    chat_template_kwargs: ChatTemplateKwargs | None = None
    add_generation_prompt: Annotated[Literal[True] | None, refused("the answer is always a new message", True)] = None
    modalities: Annotated[Items[Literal["text"]], Field(min_length=1)] | None = None
    verbosity: Literal["low", "medium", "high"] | None = None
    """Accepted, without effect; so are the fields below it."""
    prediction: dict[str, Any] | None = None
    moderation: Moderation | None = None
    function_call: Annotated[Literal["none", "auto"] | None, refused("use tool_choice", "none", "auto")] = None
    functions: Annotated[None, refused("use tools")] = None
    """Refused; so are the fields below it."""
    audio: Annotated[None, refused("this server answers with text only")] = None
    web_search_options: Annotated[None, refused("this server does not search the web")] = None

    @model_validator(mode="after")
    def _fits_together(self) -> ChatBody:
        require_calls_before_results(self.messages)
        require_few_pictures(self.messages)
        if self.top_logprobs is not None and not self.logprobs:
            raise at_fault("top_logprobs", "only allowed when logprobs is true")
        names = [tool.function.name for tool in self.tools or ()]
        if len(set(names)) < len(names):
            raise at_fault("tools", "two functions have the same name")
        if self.tool_choice in ("auto", "required") and not names:
            raise at_fault("tool_choice", "only allowed when tools are given")
        for name in self.chosen_names or ():
            if name not in names:
                raise at_fault("tool_choice", f"the function {name!r} is not among the tools")
        return self

    @property
    def thinking(self) -> bool:
        """Whether the model reasons before it answers."""
        if self.chat_template_kwargs is not None:
            return self.chat_template_kwargs.enable_thinking
        return self.reasoning_effort not in (None, "none")

    @property
    def usable_tools(self) -> list[Tool]:
        """The tools that the model reads of: none of them with tool_choice none."""
        return [] if self.tool_choice == "none" else self.tools or []

    @property
    def chosen_names(self) -> list[str] | None:
        """The functions that tool_choice names: no other may be called. None where it names none."""
        if isinstance(self.tool_choice, NamedToolChoice):
            return [self.tool_choice.function.name]
        if isinstance(self.tool_choice, AllowedToolsChoice):
            return [tool.function.name for tool in self.tool_choice.allowed_tools.tools]
        return None

    @property
    def must_call(self) -> bool:
        """Whether the answer is one call or more."""
        if isinstance(self.tool_choice, AllowedToolsChoice):
            return self.tool_choice.allowed_tools.mode == "required"
        return self.tool_choice == "required" or isinstance(self.tool_choice, NamedToolChoice)


# --- The other endpoints --------------------------------------------------------------------------

_SeveralIds = Annotated[Items[TokenIds], Field(min_length=1)]
Texts = str | TokenIds | Annotated[Items[str], Field(min_length=1)] | _SeveralIds


class CompletionBody(GenerationBody):
    """POST /v1/completions. A text is read as the start of a document; token ids are taken as they are."""

    prompt: Texts
    max_tokens: int | None = Field(None, ge=0, description="0 only with echo")
    logprobs: int | None = Field(None, ge=0, le=5)
    best_of: int | None = Field(None, ge=1, description="only equal to n")
    echo: bool | None = Field(None, description="the prompt before the answer, with log-probabilities of its tokens")
    suffix: Annotated[Literal[""] | None, refused("text before a given end is not supported", "")] = None

    @model_validator(mode="after")
    def _fits_together(self) -> CompletionBody:
        if self.max_tokens == 0 and not self.echo:
            raise at_fault("max_tokens", "0 is only allowed with echo")
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise at_fault("best_of", "another number than n is not supported")
        return self


class EmbeddingBody(_Body):
    """POST /v1/embeddings."""

    input: _Text | TokenIds | Annotated[Items[_Text], Field(min_length=1)] | _SeveralIds
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[None, refused("not supported: a vector has the model's hidden size")] = None


class ReloadBody(Strict):
    """POST /admin/reload."""

    model: str
    """A name that /v1/models lists."""
    folder: str | None = None
    """Model, adapter or run folder on the server to read the weights from; by default the one the model came from."""
