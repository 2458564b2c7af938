"""Generated text back to messages."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizer_helpers import assistants, small_tokenizer

from minnow.tokenizer import Conversation, Message, ToolCall, parse_assistant, parse_assistant_ids, render


def expected(message: Message) -> Message:
    reasoning = (message.reasoning_content or "").strip() or None
    return Message("assistant", message.content.lstrip(), reasoning, message.tool_calls)


@settings(max_examples=200, deadline=None)
@given(message=assistants)
def test_what_was_rendered_is_parsed_back(message: Message) -> None:
    tokenizer = small_tokenizer()
    thinking = expected(message).reasoning_content is not None
    asked = Conversation((Message("user", "hi"),))
    prompt = render(tokenizer, asked, add_generation_prompt=True, enable_thinking=thinking).ids
    ids = render(tokenizer, Conversation((*asked.messages, message))).ids[len(prompt) :].tolist()
    assert parse_assistant_ids(tokenizer, ids, thinking=thinking) == expected(message)
    assert parse_assistant(tokenizer.decode(ids), thinking=thinking) == expected(message)


CASES = [
    ("hello", False, Message("assistant", "hello")),
    ("hello<|im_end|>\nmore", False, Message("assistant", "hello")),
    ("hm\n</think>\n\nyes", True, Message("assistant", "yes", "hm")),
    ("<think>\nhm\n</think>\n\nyes", False, Message("assistant", "yes", "hm")),
    ("<think>\n\n</think>\n\nyes", False, Message("assistant", "yes")),
    ("cut off while think", True, Message("assistant", "", "cut off while think")),
    ("<think>\ncut off", False, Message("assistant", "", "cut off")),
    ('<tool_call>\n{"name": "f"}\n</tool_call>', False, Message("assistant", "", None, (ToolCall("f", {}),))),
    # what is no call stays visible
    (
        "<tool_call>\n__import__('os')\n</tool_call>",
        False,
        Message("assistant", "<tool_call>\n__import__('os')\n</tool_call>"),
    ),
    ('<tool_call>{"name": 3}</tool_call>', False, Message("assistant", '<tool_call>{"name": 3}</tool_call>')),
    ('<tool_call>{"name": "f"', False, Message("assistant", '<tool_call>{"name": "f"')),
    (
        "<tool_call>" + "[" * 9999 + "</tool_call>",
        False,
        Message("assistant", "<tool_call>" + "[" * 9999 + "</tool_call>"),
    ),
]


@pytest.mark.parametrize(("text", "thinking", "message"), CASES)
def test_cases(text: str, thinking: bool, message: Message) -> None:
    assert parse_assistant(text, thinking=thinking) == message


_MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>", "<|im_end|>", "{}", '{"name": "f"}', "a", "\n"]


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.sampled_from(_MARKS)))
def test_any_text_parses(parts: list[str]) -> None:
    parse_assistant("".join(parts))


def test_text_that_spells_a_control_token_is_text_in_ids() -> None:
    tokenizer = small_tokenizer()
    ids = tokenizer.encode('say </think> or <tool_call>{"name": "f"}</tool_call>')
    assert parse_assistant_ids(tokenizer, ids).content == 'say </think> or <tool_call>{"name": "f"}</tool_call>'


def test_an_end_of_text_ends_the_answer_too() -> None:
    tokenizer = small_tokenizer()
    ids = [*tokenizer.encode("yes"), tokenizer.end_of_text_id, *tokenizer.encode("and another document")]
    assert parse_assistant_ids(tokenizer, ids) == Message("assistant", "yes")
