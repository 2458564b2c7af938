"""What a row may look like, and what it becomes: a Document or a Conversation.

Pretraining rows hold `text` or `content`. Conversation rows hold `conversations` or `messages` (a list, or its JSON)
of `role`/`content` or of ShareGPT's `from`/`value`, or Alpaca's `instruction`/`input`/`output`. Tools stand in `tools`
(or `functions`) of the row or of the system message, calls in `tool_calls` (or OpenAI's older `function_call`) of the
assistant's, each as JSON text or as objects, flat or in OpenAI's `function` wrapper. Users may show pictures, see
`minnow.data.pictures`. A row that fits none of this raises RowError with what is wrong.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minnow.data.openai_form import nameless_tool, openai_tools
from minnow.data.pictures import MARKER, PICTURE_KEYS, READ, Pictures, content_parts, has_pictures, in_place
from minnow.data.values import RowError, checked_text, from_json, keys_of, kind_of, require_json
from minnow.tokenizer.chat import Conversation, Message, ToolCall

TEXT_KEYS = ("text", "content")
CONVERSATION_KEYS = ("conversations", "messages")
OTHER_KEYS = ("instruction", "input", "output", "system", "history", "tools", "functions", "caption", *PICTURE_KEYS)

_ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
}
_REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
# R1 text: the reasoning stands in the content, before the answer; only at its very start, never searched for.
_R1 = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)
_ANSWER = re.compile(r"\s*<answer>\n?(.*?)\n?</answer>\s*", re.DOTALL)


@dataclass(frozen=True)
class Document:
    """A text to pretrain on."""

    text: str


def parse_document(row: Mapping[str, Any]) -> Document:
    """Read a pretraining row. Raises RowError."""
    present = [key for key in TEXT_KEYS if row.get(key) is not None]
    if not present:
        hint = ""
        if is_conversation(row):
            hint = "; it looks like a conversation, which is for `minnow sft`, or for `minnow vlm` if it has pictures"
        elif row.get("input_ids") is not None:
            hint = "; ids of another tokenizer cannot be used, give the text they came from"
        nulls = [f"`{key}` is null" for key in TEXT_KEYS if key in row]
        raise RowError(f"{nulls[0] if nulls else f'no `text` or `content`, only {keys_of(row)}'}{hint}")
    text = checked_text(row[present[0]], f"`{present[0]}`")
    if not text.strip():
        raise RowError(f"`{present[0]}` is empty")
    return Document(text)


def is_conversation(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like a conversation."""
    if any(row.get(key) is not None for key in (*CONVERSATION_KEYS, "instruction")):
        return True
    return row.get("caption") is not None and has_pictures(row)


def parse_conversation(row: Mapping[str, Any], pictures: Pictures = READ) -> Conversation:
    """Read a conversation row; it has a user turn first and something to train on. Raises RowError."""
    key = next((key for key in CONVERSATION_KEYS if row.get(key) is not None), None)
    if key is not None:
        items = from_json(row[key], f"`{key}`")
        if not isinstance(items, list):
            raise RowError(f"`{key}` must be a list of messages, it is {kind_of(items)}")
        raw: list[Any] = items
    elif row.get("instruction") is not None:
        if row.get("output") is None:
            raise RowError("an `instruction` without an `output`")
        raw = [*alpaca_messages(row), {"role": "assistant", "content": row["output"]}]
    elif is_conversation(row):  # a picture with its caption: what is to be said where it is shown without a word
        raw = [{"role": "user", "content": MARKER}, {"role": "assistant", "content": row["caption"]}]
    else:
        raise RowError(_no_conversation(row))
    if not raw:
        raise RowError("the conversation is empty")
    raw = with_pictures(row, raw, looks=pictures.looks)
    messages = behind_system(row, tuple(parse_message(item, number, pictures) for number, item in enumerate(raw, 1)))
    check_order(messages)
    return Conversation(messages=messages, tools=parse_tools(row, raw))


def with_pictures(row: Mapping[str, Any], raw: list[Any], *, looks: bool) -> list[Any]:
    """Raw messages with the row's pictures in the users' contents. Raises RowError; looks: see `in_place`."""
    if not has_pictures(row):
        return raw
    users = [place for place, item in enumerate(raw) if isinstance(item, Mapping) and _is_user(item)]
    shown = dict(zip(users, in_place([_value(raw[place]) for place in users], row, looks=looks), strict=True))
    return [{**item, "content": shown[place]} if place in shown else item for place, item in enumerate(raw)]


def behind_system(row: Mapping[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """The messages behind the row's `system`, which some write apart from them. Raises RowError where both differ.

    An empty system message is none: it may hold the tools, which clients send beside the messages.
    """
    if messages and messages[0].role == "system" and not messages[0].content.strip():
        messages = messages[1:]
    system = row.get("system")
    if isinstance(system, list):
        system = _content(system, "`system`")
    if not isinstance(system, str) or not system.strip():
        return messages
    if messages and messages[0].role == "system":
        if messages[0].content != system:
            raise RowError("`system` and the first message are two different system messages")
        return messages
    return (Message(role="system", content=checked_text(system, "`system`")), *messages)


def conversation_row(conversation: Conversation) -> dict[str, Any]:
    """The row that `parse_conversation` reads as this conversation: `messages`, and `tools` where there are any."""
    messages = []
    for message in conversation.messages:
        content = content_parts(message) if message.images else message.content
        row: dict[str, Any] = {"role": message.role, "content": content}
        if message.reasoning_content is not None:
            row["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            row["tool_calls"] = [{"name": call.name, "arguments": call.arguments} for call in message.tool_calls]
        if message.weight != 1:
            row["weight"] = message.weight
        messages.append(row)
    return {"messages": messages} | ({"tools": conversation.tools} if conversation.tools else {})


def canonical(example: Document | Conversation) -> bytes:
    """Return the content as bytes, the same for the same content whatever format it came in; hashed for the split.

    Without the messages' weights: what is learnt in one row is not examined in another.
    """
    if isinstance(example, Document):
        return example.text.encode()
    turns = [
        [m.role, m.content, m.reasoning_content, [[c.name, c.arguments] for c in m.tool_calls], *_shown(m)]
        for m in example.messages
    ]
    return json.dumps([turns, list(example.tools)], ensure_ascii=True, sort_keys=True).encode()


def _shown(message: Message) -> list[Any]:
    return [[[image.offset, image.digest] for image in message.images]] if message.images else []


def check_order(messages: tuple[Message, ...]) -> None:
    """Raise RowError unless a user speaks first, after a system message at most, and the assistant says something."""
    first = next((number for number, message in enumerate(messages) if message.role != "system"), None)
    if first is not None and messages[first].role == "assistant":
        raise RowError("the conversation starts with the assistant: there is no user message to answer")
    if first is not None and messages[first].role == "tool":
        raise RowError("the conversation starts with a tool result: there is no call that it answers")
    answers = [message for message in messages if message.role == "assistant"]
    if not answers:
        raise RowError("no supervised token: the conversation has no assistant message")
    learnt = [message for message in answers if message.weight]
    if not learnt:
        raise RowError("no supervised token: every assistant message has weight 0")
    if not any(m.content.strip() or m.tool_calls or m.reasoning_content for m in learnt):
        raise RowError("no supervised token: every assistant message is empty or has weight 0")


def parse_message(item: Any, number: int, pictures: Pictures = READ) -> Message:
    """Read message `number` (from 1) of a conversation in any of the forms. Raises RowError.

    By default pictures are read from wherever on this machine the message says: not for what strangers send.
    """
    where = f"message {number}"
    if not isinstance(item, Mapping):
        raise RowError(f"{where} must be an object with `role` and `content`, it is {kind_of(item)}")
    written = _role(item)
    if not isinstance(written, str) or written.lower() not in _ROLES:
        known = ", ".join(_ROLES)
        raise RowError(f"{where} has role {json.dumps(written, default=str)}; known are {known}")
    role = _ROLES[written.lower()]
    value = _value(item)
    if written.lower() == "function_call":  # ShareGPT writes a call as a turn of its own
        thought = _reasoning(item, where)
        if not thought and isinstance(value, str):
            thought, value = _split_reasoning(value)
        return Message(role, "", thought or None, _tool_calls(value, where), _weight(item, where))
    calls = _tool_calls(item.get("tool_calls") or item.get("function_call"), where) if role == "assistant" else ()
    if value is None and not calls:
        raise RowError(f"{where} ({role}) has no `content`")
    if role == "user":
        text, images = pictures.content(value, f"`content` of {where}")
        return Message(role, text, images=images)
    content = _content(value, f"`content` of {where}")
    if role != "assistant":
        return Message(role=role, content=content)
    thought = _reasoning(item, where)
    if not thought:
        thought, content = _split_reasoning(content)
    return Message(role, content, thought or None, calls, _weight(item, where))


def _role(item: Mapping[str, Any]) -> Any:
    """As written; data sets of both forms put together have both keys in every row, one of them null."""
    return item.get("from") if item.get("role") is None else item["role"]


def _value(item: Mapping[str, Any]) -> Any:
    return item.get("value") if item.get("content") is None else item["content"]


def _is_user(item: Mapping[str, Any]) -> bool:
    written = _role(item)
    return isinstance(written, str) and _ROLES.get(written.lower()) == "user"


def _weight(item: Mapping[str, Any], where: str) -> float:
    weight = 1 if item.get("weight") is None else item["weight"]
    if weight not in (0, 1):
        raise RowError(
            f"`weight` of {where} must be 0 (not to be learnt) or 1, it is {json.dumps(weight, default=str)}"
        )
    return float(weight)


def _reasoning(item: Mapping[str, Any], where: str) -> str:
    """What stands under one of the usual names; several are given where data sets were put together."""
    given = {key: item[key] for key in _REASONING_KEYS if item.get(key) not in (None, "")}
    texts = {checked_text(value, f"`{key}` of {where}") for key, value in given.items()}
    if len(texts) > 1:
        raise RowError(f"{' and '.join(f'`{key}`' for key in given)} of {where} are different thoughts")
    return texts.pop() if texts else ""


def _split_reasoning(content: str) -> tuple[str, str]:
    """Split R1 text into reasoning and answer; a lone `<answer>` wrapper around the rest goes as well."""
    match = _R1.fullmatch(content)
    if match is None:
        return "", content
    reasoning, answer = match[1].strip("\n"), match[2].lstrip("\n")
    wrapped = _ANSWER.fullmatch(answer)
    return reasoning if reasoning.strip() else "", wrapped[1] if wrapped else answer


def _content(value: Any, what: str) -> str:
    if value is None:
        return ""
    if isinstance(value, list):  # OpenAI's content parts
        for part in value:
            if not isinstance(part, Mapping) or part.get("type") != "text":
                raise RowError(f"{what} has a part that is not text")
        return "".join(checked_text(part.get("text"), what) for part in value)
    return checked_text(value, what)


def _tool_calls(value: Any, where: str) -> tuple[ToolCall, ...]:
    if value is None or value == "":
        return ()
    parsed = from_json(value, f"`tool_calls` of {where}")
    calls = []
    for item in parsed if isinstance(parsed, list) else [parsed]:
        call = item.get("function", item) if isinstance(item, Mapping) else item
        if not isinstance(call, Mapping) or not isinstance(call.get("name"), str):
            raise RowError(f"a tool call of {where} has no `name`")
        arguments = call.get("arguments") or call.get("parameters")  # Llama's word for them
        arguments = from_json(arguments, f"`arguments` of {call['name']} in {where}") if arguments else {}
        if not isinstance(arguments, dict):
            raise RowError(f"`arguments` of {call['name']} in {where} must be an object, not {kind_of(arguments)}")
        require_json(arguments, f"`arguments` of {call['name']} in {where}")
        calls.append(ToolCall(name=checked_text(call["name"], "the name of a tool"), arguments=arguments))
    return tuple(calls)


def parse_tools(row: Mapping[str, Any], items: list[Any]) -> tuple[dict, ...]:
    """Read the tools that the row or one of its messages declares. Raises RowError."""
    holders = [row, *(item for item in items if _ROLES[_role(item).lower()] == "system")]
    given = [_tools(holder[key], key) for holder in holders for key in ("tools", "functions") if holder.get(key)]
    given = [tools for tools in given if tools]
    if any(tools != given[0] for tools in given):
        raise RowError("two different lists of tools are given")
    return given[0] if given else ()


def _tools(value: Any, key: str) -> tuple[dict, ...]:
    tools = from_json(value, f"`{key}`")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise RowError(f"`{key}` must be a list of objects")
    require_json(tools, f"`{key}`")
    if (number := nameless_tool(tools)) is not None:
        raise RowError(f"tool {number} of `{key}` has no `name`")
    return tuple(openai_tools(tools))  # as a server shows them: a model is served in the form that it was taught


def alpaca_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Read Alpaca's system, history, instruction and input as messages, the `output` left out. Raises RowError."""
    messages: list[dict[str, Any]] = []
    if row.get("system"):
        messages.append({"role": "system", "content": row["system"]})
    history = from_json(row.get("history") or [], "`history`")
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise RowError("`history` must be a list of [question, answer] pairs")
    for pair in history:
        messages += [{"role": "user", "content": pair[0]}, {"role": "assistant", "content": pair[1]}]
    question = checked_text(row["instruction"], "`instruction`")
    if row.get("input"):
        question += "\n" + checked_text(row["input"], "`input`")
    return [*messages, {"role": "user", "content": question}]


def _no_conversation(row: Mapping[str, Any]) -> str:
    hint = ""
    if row.get("chosen") is not None:
        hint = "; it looks like a preference pair, which is for `minnow dpo` and `minnow reward`"
    elif row.get("input_ids") is not None:
        hint = "; ids of another tokenizer cannot be used, give the conversations they came from"
    elif any(row.get(key) is not None for key in TEXT_KEYS):
        hint = "; it looks like a text, which is for `minnow pretrain`"
    elif any(row.get(key) is not None for key in ("completion", "response", "answer", "output")):
        hint = "; write a question and its answer as `instruction` and `output`, or as `messages`"
    return f"no `conversations`, `messages` or `instruction`, only {keys_of(row)}{hint}"
