"""The messages of a chat request, in OpenAI's form."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import Field, model_validator

from minnow.serving.pictures import MAX_PICTURES
from minnow.serving.validation import Items, Part, at_fault, refused


class TextPart(Part):
    """A piece of a message's content."""

    type: Literal["text"]
    text: str


class ImageURL(Part):
    """A picture, and where it is."""

    url: str
    """data:image/png;base64,... (or image/jpeg, image/webp, image/gif): the picture itself."""
    detail: str | None = None
    """Accepted, without effect: a model looks at all pictures in the size that it was taught."""


class ImagePart(Part):
    """A picture in a user's content."""

    type: Literal["image_url"]
    image_url: ImageURL


class RefusalPart(Part):
    """A piece of an assistant's content with which it declined."""

    type: Literal["refusal"]
    refusal: str


class CalledFunction(Part):
    """What an assistant called earlier."""

    name: str
    arguments: str
    """A JSON object, as text."""


class MessageToolCall(Part):
    """A call in an assistant's earlier message."""

    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class SystemMessage(Part):
    """Instructions."""

    role: Literal["system", "developer"]
    content: str | Items[TextPart]


class UserMessage(Part):
    """What the user says and shows."""

    role: Literal["user"]
    content: str | Items[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class AssistantMessage(Part):
    """What the assistant said or called."""

    role: Literal["assistant"]
    content: str | Items[Annotated[TextPart | RefusalPart, Field(discriminator="type")]] | None = None
    refusal: str | None = None
    """What OpenAI's models say in place of the content."""
    reasoning_content: str | None = None
    tool_calls: Items[MessageToolCall] | None = None
    function_call: Annotated[None, refused("use tool_calls")] = None
    """Refused, or a call would be missing from what the model reads."""
    audio: Annotated[None, refused("this server hears nothing")] = None

    @model_validator(mode="after")
    def _is_not_empty(self) -> AssistantMessage:
        if self.content is None and self.refusal is None and self.reasoning_content is None and not self.tool_calls:
            raise ValueError("an assistant's message needs content or tool_calls")
        return self


class ToolMessage(Part):
    """What a tool gave back."""

    role: Literal["tool"]
    content: str | Items[TextPart]
    tool_call_id: str


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]


def require_few_pictures(messages: Sequence[ChatMessage]) -> None:
    """The error of `at_fault` for more pictures than a request may have."""
    contents = [message.content for message in messages if isinstance(message, UserMessage)]
    count = sum(isinstance(part, ImagePart) for content in contents for part in content)
    if count > MAX_PICTURES:
        raise at_fault("messages", f"{count} pictures; at most {MAX_PICTURES} are looked at")


def require_calls_before_results(messages: Sequence[ChatMessage]) -> None:
    """The error of `at_fault` for a tool's message that answers no call of the assistant's message before it."""
    called: set[str | None] = set()
    for i, message in enumerate(messages):
        if isinstance(message, ToolMessage):
            if message.tool_call_id not in called:
                reason = f"the assistant's message before it has no call with the id {message.tool_call_id!r}"
                raise at_fault(f"messages.{i}.tool_call_id", reason)
        elif isinstance(message, AssistantMessage):
            called = {call.id for call in message.tool_calls or ()}
        else:
            called = set()
