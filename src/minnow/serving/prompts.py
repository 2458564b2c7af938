"""A chat request to the conversation that the model reads. What people wrote is text and never a control token."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from minnow.serving.errors import APIError
from minnow.serving.messages import AssistantMessage, ChatMessage, MessageToolCall, RefusalPart, TextPart
from minnow.serving.requests import ChatBody, Tool
from minnow.tokenizer import Conversation, Message, Tokenizer, ToolCall, render


def chat_prompt_ids(tokenizer: Tokenizer, body: ChatBody) -> list[int]:
    """Token ids of the conversation, with the next assistant turn open. APIError where a message makes no sense."""
    messages = tuple(_message(message, f"messages.{i}") for i, message in enumerate(body.messages))
    conversation = Conversation(messages, tools=tuple(map(tool_schema, body.usable_tools)))
    rendered = render(tokenizer, conversation, add_generation_prompt=True, enable_thinking=body.thinking)
    return list(rendered.ids.tolist())


def tool_schema(tool: Tool) -> dict[str, Any]:
    """The tool as the template shows it to the model: what the client sent, without what it left out."""
    return tool.model_dump(exclude_unset=True, exclude={"function": {"strict"}})


def require_fit(prompt_ids: Sequence[int], context: int, param: str, *, answered: bool = True) -> None:
    """APIError 400 that names both lengths when the prompt leaves no room for an answer, if it is `answered`."""
    room, what, shared = (context - 1, "prompt", ", prompt and answer together") if answered else (context, "text", "")
    if len(prompt_ids) > room:
        raise APIError(
            400,
            f"This model's maximum context length is {context} tokens{shared}. However, your {what} has "
            f"{len(prompt_ids)} tokens. Please shorten it.",
            param=param,
            code="context_length_exceeded",
        )


def _message(message: ChatMessage, where: str) -> Message:
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
