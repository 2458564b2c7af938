"""A chat request to the conversation that the model reads. What people wrote is text and never a control token."""

from __future__ import annotations

import json
from typing import Any

from minnow.serving.errors import APIError
from minnow.serving.messages import AssistantMessage, ChatMessage, MessageToolCall, RefusalPart, TextPart, UserMessage
from minnow.serving.pictures import picture_data
from minnow.serving.requests import ChatBody, Tool
from minnow.tokenizer import Conversation, Message, Rendered, Tokenizer, ToolCall, render
from minnow.tokenizer.images import Image


def chat_prompt(tokenizer: Tokenizer, body: ChatBody) -> Rendered:
    """The conversation as the model reads it, with the next assistant turn open.

    APIError where a message makes no sense, for the address of a picture, and for pictures that a model which only
    reads is shown.
    """
    messages = tuple(_message(message, f"messages.{i}") for i, message in enumerate(body.messages))
    conversation = Conversation(messages, tools=tuple(map(tool_schema, body.usable_tools)))
    if tokenizer.image_format is None and any(message.images for message in messages):
        raise APIError(400, f"The model `{body.model}` reads text only: it cannot look at pictures.", param="messages")
    return render(tokenizer, conversation, add_generation_prompt=True, enable_thinking=body.thinking)


def tool_schema(tool: Tool) -> dict[str, Any]:
    """The tool as the template shows it to the model: what the client sent, without what it left out."""
    return tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


def require_fit(length: int, context: int, param: str, *, answered: bool = True) -> None:
    """APIError 400 that names both lengths when a prompt of so many tokens leaves no room for an answer, if it is
    `answered`."""
    room, what, shared = (context - 1, "prompt", ", prompt and answer together") if answered else (context, "text", "")
    if length > room:
        raise APIError(
            400,
            f"This model's maximum context length is {context} tokens{shared}. However, your {what} has "
            f"{length} tokens. Please shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def _message(message: ChatMessage, where: str) -> Message:
    if isinstance(message, UserMessage):
        return _user_message(message, where)
    content = message.content or ""
    if isinstance(message, AssistantMessage):
        content = content or message.refusal or ""
    text = content if isinstance(content, str) else "".join(map(_part_text, content))
    if not isinstance(message, AssistantMessage):
        return Message("system" if message.role == "developer" else message.role, text)
    calls = enumerate(message.tool_calls or ())
    return Message(
        "assistant",
        text,
        message.reasoning_content,
        tuple(_tool_call(call, f"{where}.tool_calls.{i}") for i, call in calls),
    )


def _user_message(message: UserMessage, where: str) -> Message:
    """Pictures stand between the texts as they do in the content."""
    if isinstance(message.content, str):
        return Message("user", message.content)
    text, images = "", []
    for i, part in enumerate(message.content):
        if isinstance(part, TextPart):
            text += part.text
        else:
            images.append(Image(picture_data(part.image_url.url, f"{where}.content.{i}.image_url.url"), len(text)))
    return Message("user", text, images=tuple(images))


def _part_text(part: TextPart | RefusalPart) -> str:
    return part.text if isinstance(part, TextPart) else part.refusal


def _tool_call(call: MessageToolCall, where: str) -> ToolCall:
    try:
        arguments = json.loads(call.function.arguments or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        name = f"{where}.function.arguments"
        raise APIError(400, f"Invalid value for '{name}': it is not the text of a JSON object", param="messages")
    return ToolCall(call.function.name, arguments)
