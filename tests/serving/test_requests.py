"""What the server makes of a request's body before any model sees it."""

from __future__ import annotations

import inspect
from typing import Any

import openai
import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from minnow.serving.config import ServingConfig
from minnow.serving.constraints import answer_grammar
from minnow.serving.errors import APIError, validation_error
from minnow.serving.requests import ChatBody, CompletionBody, EmbeddingBody
from minnow.serving.sampling import sampling_params
from tests.tokenizer.tokenizer_helpers import small_tokenizer

HELLO = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}
CALL = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{}"}}


def refused(kind: type[BaseModel], body: dict[str, Any]) -> tuple[ValidationError, APIError]:
    with pytest.raises(ValidationError) as found:
        kind.model_validate(body)
    return found.value, validation_error(found.value.errors())


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (EmbeddingBody, {"model": "m", "input": [None] * 100_000}),
        (EmbeddingBody, {"model": "m", "input": [[None] * 1000] * 1000}),
        (CompletionBody, {"model": "m", "prompt": ["a"] * 10 + [None] * 100_000}),
        (CompletionBody, {"model": "m", "prompt": "a", "stop_token_ids": [None] * 900}),
        (ChatBody, {"model": "m", "messages": [0] * 100_000}),
        (ChatBody, {"model": "m", "messages": [{"role": "user", "content": [0] * 100_000}]}),
        (ChatBody, HELLO | {str(n): 0 for n in range(100_000)}),
        (ChatBody, HELLO | {"logit_bias": {str(n): None for n in range(100_000)}}),
        (ChatBody, HELLO | {"tools": [{str(n): 0 for n in range(100_000)}]}),
        (ChatBody, HELLO | {"stream": True, "stream_options": {str(n): 0 for n in range(100_000)}}),
    ],
)
def test_a_body_is_read_to_its_first_mistake(kind: type[BaseModel], body: dict[str, Any]) -> None:
    """One error for each of 100,000 mistakes would keep the event loop busy for seconds."""
    error, told = refused(kind, body)
    assert error.error_count() < 20
    assert len(str(told)) < 500


def test_every_parameter_of_openai_s_client_is_known() -> None:
    """Taken without effect where it cannot change a text; named where it is not supported."""
    client = openai.OpenAI(api_key="-")
    ours = {"extra_headers", "extra_query", "extra_body", "timeout", "self"}  # the client's own
    for create, body in ((client.chat.completions.create, ChatBody), (client.completions.create, CompletionBody)):
        assert set(inspect.signature(create).parameters) - ours <= set(body.model_fields)
    given = {
        "modalities": ["text"],
        "verbosity": "low",
        "prediction": {"type": "content", "content": "so"},
        "prompt_cache_retention": "24h",
        "moderation": {"model": "omni"},
        "function_call": "none",
        "reasoning_effort": "max",
        "skip_special_tokens": True,
        "add_generation_prompt": True,
    }
    ChatBody.model_validate(HELLO | given)
    for name, value in {"audio": {"voice": "x"}, "functions": [], "web_search_options": {}}.items():
        _, told = refused(ChatBody, HELLO | {name: value})
        assert told.param == name


def test_top_p_zero_is_the_likeliest_token() -> None:
    params = sampling_params(ChatBody.model_validate(HELLO | {"top_p": 0}), ServingConfig(), max_tokens=1)
    assert (params.temperature, params.top_p) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": {"type": "function", "function": {"name": "zz"}}}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"messages": [{"role": "tool", "content": "4", "tool_call_id": "c1"}]}, "messages"),
        ({"messages": [*HELLO["messages"], {"role": "assistant"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, "response_format"),
    ],
)
def test_a_misfit_names_its_field_and_gives_no_other_advice(more: dict[str, Any], param: str) -> None:
    _, told = refused(ChatBody, HELLO | more)
    assert told.param == param
    assert "application/json" not in str(told)
    assert ".user." not in str(told)
    assert "json_schema.json_schema" not in str(told)


def test_a_body_that_is_no_object_is_told_what_to_send() -> None:
    with pytest.raises(ValidationError) as found:
        TypeAdapter(ChatBody).validate_python([])
    assert "application/json" in str(validation_error(found.value.errors()))


def test_results_may_follow_calls() -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [CALL, CALL]}
    result = {"role": "tool", "content": "4", "tool_call_id": "c1"}
    ChatBody.model_validate(HELLO | {"messages": [*HELLO["messages"], calls, result, result]})
    _, told = refused(ChatBody, HELLO | {"messages": [calls, *HELLO["messages"], result]})
    assert "must follow" in str(told)


def test_an_empty_text_has_no_embedding() -> None:
    for given in ("", ["a", ""]):
        assert refused(EmbeddingBody, {"model": "m", "input": given})[1].param == "input"


@pytest.mark.parametrize("key", ["1_0", "٣", " 1", "+1", "-1", ""])
def test_the_keys_of_logit_bias_are_token_ids(key: str) -> None:
    body = ChatBody.model_validate(HELLO | {"logit_bias": {key: 1.0}})
    with pytest.raises(APIError, match="must be token ids"):
        sampling_params(body, ServingConfig(), max_tokens=1)


@pytest.mark.parametrize("kind", ["string", "array", ["string", "null"]])
def test_a_function_takes_an_object(kind: Any) -> None:
    """Anything else in its place could not be read as a call, and came back as text."""
    body = HELLO | {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}]}
    with pytest.raises(APIError, match="must be of type object"):
        answer_grammar(small_tokenizer(), ChatBody.model_validate(body))


def test_an_object_or_nothing_is_an_object() -> None:
    parameters = {"type": ["object", "null"], "properties": {"a": {"type": "string"}}}
    body = HELLO | {"tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}]}
    grammar = answer_grammar(small_tokenizer(), ChatBody.model_validate(body))
    assert grammar is not None
    assert '"null"' not in grammar
