"""The messages of a chat request, in OpenAI's form."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from minnow.serving.validation import Items, Part


class TextPart(Part):
    """A piece of a message's content; text is the only kind so far."""

    type: Literal["text"]
    text: str


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
    """What the user says."""

    role: Literal["user"]
    content: str | Items[TextPart]


class AssistantMessage(Part):
    """What the assistant said or called."""

    role: Literal["assistant"]
    content: str | Items[TextPart] | None = None
    reasoning_content: str | None = None
    tool_calls: Items[MessageToolCall] | None = None


class ToolMessage(Part):
    """What a tool gave back."""

    role: Literal["tool"]
    content: str | Items[TextPart]
    tool_call_id: str | None = None


ChatMessage = Annotated[SystemMessage | UserMessage | AssistantMessage | ToolMessage, Field(discriminator="role")]
