"""A small tokenizer, and conversations of every shape."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from minnow.data.readers import read_texts
from minnow.tokenizer import Conversation, Message, Tokenizer, ToolCall, train_tokenizer
from minnow.tokenizer.special import CHAT_TOKENS

CORPUS = [
    "The small fish lives in the old pond. It's blue, and it doesn't eat 12 snails.\n\nuser assistant system tool\n",
    "小鱼住在旧池塘里。它是蓝色的，不吃蜗牛。\n\n你好，请问今天天气怎么样？\n",
    '{"name": "weather", "arguments": {"city": "Paris", "days": 3}}\n',
    "# Tools\n\nYou may call one or more functions to assist with the user query.\n\n\n\n",
    "def f(x):\n    return x + 1\n\n\n    # done...\r\n\r\n",
] * 4

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
"""A template that many models have, and not minnow's: no think blocks, no tools."""


@functools.cache
def small_tokenizer() -> Tokenizer:
    return train_tokenizer(CORPUS, 500)


def real_texts(*names: str, limit: int = 10**9) -> list[str]:
    """Documents of sets in MINNOW_DATA/pretrain; the test is skipped where there is none."""
    if "MINNOW_DATA" not in os.environ:
        pytest.skip("set MINNOW_DATA to a folder with real text")
    folder = Path(os.environ["MINNOW_DATA"]) / "pretrain"
    texts: Iterator[str] = itertools.chain.from_iterable(read_texts([str(folder / f"{n}.jsonl.zst")]) for n in names)
    return list(itertools.islice(texts, limit))


def messages_for_transformers(conversation: Conversation) -> list[dict[str, Any]]:
    """What a client of an OpenAI-like API sends."""
    rows = []
    for message in conversation.messages:
        row: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.reasoning_content is not None:
            row["reasoning_content"] = message.reasoning_content
        if message.tool_calls:
            calls = [dataclasses.asdict(call) for call in message.tool_calls]
            row["tool_calls"] = [{"type": "function", "function": call} for call in calls]
        rows.append(row)
    return rows


def _no_control_text(text: str) -> bool:
    return not any(token in text for token in (*CHAT_TOKENS, "<|"))


_WORDS = st.sampled_from(
    [
        "fish",
        "小鱼",
        " ",
        "\n",
        "\n\n",
        "\t",
        "\r\n",
        "　",
        "3.14",
        "'S",
        "...",
        "é",
        "🐟",
        "<",
        "|",
        ">",
        "{",
        '"',
        "\\",
        "\x85",
    ]
)
texts = (st.text(max_size=12) | st.lists(_WORDS, max_size=10).map("".join)).filter(_no_control_text)
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | texts,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(texts, inner, max_size=2),
    max_leaves=4,
)
tool_calls = st.builds(ToolCall, texts, st.dictionaries(texts, json_values, max_size=3))
users = st.builds(Message, st.just("user"), texts)
tool_results = st.builds(Message, st.just("tool"), texts)
systems = st.builds(Message, st.just("system"), texts)
assistants = st.builds(
    Message,
    st.just("assistant"),
    texts,
    st.none() | texts,
    st.lists(tool_calls, max_size=2).map(tuple),
)
tools = st.lists(
    st.fixed_dictionaries({"type": st.just("function"), "function": st.dictionaries(texts, json_values, max_size=2)}),
    max_size=2,
).map(tuple)
conversations = st.builds(
    lambda system, messages, tools: Conversation((*system, *messages), tools),
    st.lists(systems, max_size=1),
    st.lists(users | assistants | tool_results | systems, min_size=1, max_size=6),
    tools,
)
