"""Bodies as the server checks them, without a server."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from minnow.serving.requests import MAX_BIASES, ChatBody, CompletionBody, EmbeddingBody, ReloadBody
from minnow.serving.validation import MAX_KEYS
from minnow.serving.web_chat import ToolBody

ASK: list[Any] = [{"role": "user", "content": "hi"}]
MANY = 5000


def errors_of(body: type[BaseModel], **given: Any) -> list[Any]:
    with pytest.raises(ValidationError) as raised:
        body.model_validate({"model": "m"} | given)
    return raised.value.errors()


# Errors are collected in the event loop, one an item and union member: their number is the time everybody waits.
@pytest.mark.parametrize(
    ("body", "given"),
    [
        (EmbeddingBody, {"input": [None] * MANY}),
        (EmbeddingBody, {"input": [[None] * MANY]}),
        (EmbeddingBody, {"input": [["x"]] * MANY}),
        (CompletionBody, {"prompt": [None] * MANY}),
        (CompletionBody, {"prompt": "x", "stop": [0] * MANY}),
        (CompletionBody, {"prompt": "x", "stop_token_ids": [-1] * 1000}),
        (CompletionBody, {"prompt": "x", "logit_bias": dict.fromkeys(map(str, range(MANY)), 1000)}),
        (ChatBody, {"messages": [0] * MANY}),
        (ChatBody, {"messages": [{"role": "user", "content": [0] * MANY}]}),
        (ChatBody, {"messages": [{"role": "assistant", "tool_calls": [0] * MANY}]}),
        (ChatBody, {"messages": ASK, "tools": [0] * 128}),
        (ChatBody, {"messages": ASK, "tools": [dict.fromkeys(map(str, range(MANY)))]}),
        (ChatBody, {"messages": ASK, "chat_template_kwargs": dict.fromkeys(map(str, range(MANY)))}),
        (ChatBody, {"messages": ASK, "stream_options": dict.fromkeys(map(str, range(MANY)))}),
        *[
            (body, dict.fromkeys(map(str, range(MANY))))
            for body in (ChatBody, CompletionBody, EmbeddingBody, ReloadBody, ToolBody)
        ],
    ],
)
def test_many_mistakes_are_few_errors(body: type[BaseModel], given: dict[str, Any]) -> None:
    assert len(errors_of(body, **given)) <= 8


@pytest.mark.parametrize("body", [ChatBody, CompletionBody, EmbeddingBody, ReloadBody, ToolBody])
def test_every_list_ends_at_its_first_wrong_item(body: type[BaseModel]) -> None:
    """So that a field which is added later cannot forget it."""

    def lists(schema: Any) -> Iterator[dict[str, Any]]:
        if isinstance(schema, dict):
            if schema.get("type") == "list":
                yield schema
            for part in schema.values():
                yield from lists(part)
        elif isinstance(schema, list | tuple):
            for part in schema:
                yield from lists(part)

    found = list(lists(body.__pydantic_core_schema__))
    assert found or body in (ReloadBody, ToolBody)
    for schema in found:
        assert schema.get("fail_fast") is True, schema


def test_as_many_keys_as_are_allowed() -> None:
    biases = dict.fromkeys(map(str, range(MAX_BIASES)), 1.0)
    body = CompletionBody.model_validate({"model": "m", "prompt": "x", "logit_bias": biases})
    assert body.logit_bias == biases
    (error,) = errors_of(CompletionBody, prompt="x", logit_bias=biases | {"x": 1.0})
    assert error["loc"] == ("logit_bias",)
    assert f"at most {MAX_BIASES}" in error["msg"]
    assert 1.5 * len(ChatBody.model_fields) <= MAX_KEYS
