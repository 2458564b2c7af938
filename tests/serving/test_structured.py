"""Tools and JSON schemas through the `openai` client: a random model, so only the constraint makes answers valid."""

from __future__ import annotations

import json
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel

from minnow.serving.constraints import answer_grammar
from minnow.serving.requests import ChatBody

from .serving_helpers import Running

ASK: list[Any] = [{"role": "user", "content": "你好"}]


class Fish(BaseModel):
    """A small answer, so that a random model comes to its end."""

    colour: Literal["red", "blue"]
    legs: Literal[0, 2]
    alive: bool


def tool(name: str, **properties: Any) -> Any:
    parameters = {"type": "object", "properties": properties, "required": list(properties)}
    return {
        "type": "function",
        "function": {"name": name, "description": "小", "parameters": parameters, "strict": True},
    }


FLAG, SIZE = {"type": "boolean"}, {"enum": ["small", "大"]}
TOOLS = [tool("swim", fast=FLAG), tool("grow-up", size=SIZE, again=FLAG)]
OPTIONS: dict[str, Any] = {"model": "wide", "messages": ASK, "max_tokens": 120}


@pytest.mark.parametrize("seed", range(4))
def test_parse_gives_an_object_of_the_schema(client: openai.OpenAI, seed: int) -> None:
    answer = client.chat.completions.parse(**OPTIONS, response_format=Fish, seed=seed)
    assert isinstance(answer.choices[0].message.parsed, Fish)
    assert answer.choices[0].finish_reason == "stop"
    # Written as the template writes JSON: no free white space.
    content = answer.choices[0].message.content
    assert content == json.dumps(json.loads(content or ""), ensure_ascii=False)


def test_json_object(client: openai.OpenAI) -> None:
    for seed in range(6):
        answer = client.chat.completions.create(**OPTIONS, response_format={"type": "json_object"}, seed=seed)
        content = answer.choices[0].message.content or ""
        assert content.startswith("{")
        if answer.choices[0].finish_reason == "stop":
            assert isinstance(json.loads(content), dict)


@pytest.mark.parametrize("thinking", [False, True])
def test_required_calls_are_valid(client: openai.OpenAI, thinking: bool) -> None:
    extra = {"chat_template_kwargs": {"enable_thinking": thinking}}
    finished = 0
    for seed in range(8):
        answer = client.chat.completions.create(
            **OPTIONS, tools=TOOLS, tool_choice="required", seed=seed, extra_body=extra,
            logit_bias={"7": 8},  # </think>: a random model may think for long
        )  # fmt: skip
        (choice,) = answer.choices
        for call in choice.message.tool_calls or ():
            assert call.type == "function"
            assert call.function.name in ("swim", "grow-up")
        if choice.finish_reason == "tool_calls":
            finished += 1
            assert choice.message.content is None
            for call in choice.message.tool_calls or ():
                check(call.function.name, json.loads(call.function.arguments))
    assert finished >= 2


def check(name: str, arguments: dict[str, Any]) -> None:
    if name == "swim":
        assert list(arguments) == ["fast"]
    else:
        assert list(arguments) == ["size", "again"]
        assert arguments["size"] in SIZE["enum"]
    assert isinstance(arguments[list(arguments)[-1]], bool)


def test_a_named_function_is_called_once(client: openai.OpenAI) -> None:
    named: Any = {"type": "function", "function": {"name": "swim"}}
    answer = client.chat.completions.create(**OPTIONS, tools=TOOLS, tool_choice=named, seed=1)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    check("swim", json.loads(call.function.arguments))
    assert call.function.name == "swim"
    assert answer.choices[0].finish_reason == "stop"  # as at OpenAI


def test_parallel_calls_can_be_refused(client: openai.OpenAI) -> None:
    for seed in range(4):
        answer = client.chat.completions.create(
            **OPTIONS, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, seed=seed
        )
        assert len(answer.choices[0].message.tool_calls or ()) == 1
        assert answer.choices[0].finish_reason == "tool_calls"


def test_streamed_calls_are_the_whole_ones(client: openai.OpenAI) -> None:
    options = OPTIONS | {"tools": TOOLS, "tool_choice": "required", "seed": 3, "n": 2}
    whole = client.chat.completions.create(**options)
    calls: list[dict[int, dict[str, str]]] = [{}, {}]
    reasons: dict[int, str] = {}
    for chunk in client.chat.completions.create(**options, stream=True):
        (choice,) = chunk.choices
        assert choice.delta.content is None  # there is none, as in the whole message
        if choice.finish_reason:
            reasons[choice.index] = choice.finish_reason
        for delta in choice.delta.tool_calls or ():
            assert delta.function is not None
            if delta.index not in calls[choice.index]:
                assert delta.id
                assert delta.id.startswith("call_")
                assert (delta.type, delta.function.arguments) == ("function", "")
                calls[choice.index][delta.index] = {"name": delta.function.name or "", "arguments": ""}
            else:
                assert delta.id is None
                assert delta.function.name is None
                calls[choice.index][delta.index]["arguments"] += delta.function.arguments or ""
    for choice in whole.choices:
        expected = [call.function.model_dump() for call in choice.message.tool_calls or ()]  # type: ignore[union-attr]
        assert [calls[choice.index][i] for i in sorted(calls[choice.index])] == expected
        assert reasons[choice.index] == choice.finish_reason


def test_the_clients_own_stream_helper(client: openai.OpenAI) -> None:
    with client.chat.completions.stream(**OPTIONS, response_format=Fish, seed=0) as stream:
        events = [event.type for event in stream]
        answer = stream.get_final_completion()
    assert isinstance(answer.choices[0].message.parsed, Fish)
    assert events[-1] == "content.done"


def test_auto_leaves_the_choice_and_none_hides_the_tools(client: openai.OpenAI) -> None:
    options = {"model": "parrot", "messages": ASK, "temperature": 0, "tools": TOOLS}
    extra = {"return_token_ids": True}
    answer = client.chat.completions.create(**options, extra_body=extra)
    assert answer.choices[0].message.content == "小鱼 swims"
    assert answer.choices[0].finish_reason == "stop"
    hidden = client.chat.completions.create(**options, tool_choice="none", extra_body=extra)
    plain = client.chat.completions.create(model="parrot", messages=ASK, temperature=0, extra_body=extra)
    assert hidden.prompt_token_ids == plain.prompt_token_ids
    assert len(answer.prompt_token_ids) > len(plain.prompt_token_ids)


def test_only_allowed_tools_are_called(client: openai.OpenAI) -> None:
    """The model reads of all of them, and its grammar holds the allowed ones."""
    swim = {"type": "function", "function": {"name": "swim"}}

    def allowed(mode: str, *names: Any) -> Any:
        return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": list(names)}}

    for seed in range(3):
        answer = client.chat.completions.create(
            **OPTIONS, tools=TOOLS, tool_choice=allowed("required", swim), seed=seed, parallel_tool_calls=False
        )
        (call,) = answer.choices[0].message.tool_calls or ()
        assert call.type == "function"
        check("swim", json.loads(call.function.arguments))
        assert call.function.name == "swim"
        assert answer.choices[0].finish_reason == "tool_calls"
    options: dict[str, Any] = {"model": "parrot", "messages": ASK, "temperature": 0, "tools": TOOLS}
    ids = {"extra_body": {"return_token_ids": True}}
    free = client.chat.completions.create(**options, tool_choice=allowed("auto", swim), **ids)
    assert free.choices[0].message.content == "小鱼 swims"
    assert free.prompt_token_ids == client.chat.completions.create(**options, **ids).prompt_token_ids
    fly = {"type": "function", "function": {"name": "fly"}}
    for names, reason in (([swim, fly], "'fly' is not among the tools"), ([], "at least 1 item")):
        with pytest.raises(openai.BadRequestError, match=reason) as raised:
            client.chat.completions.create(**options, tool_choice=allowed("auto", *names))
        assert raised.value.param == "tool_choice"


def test_a_tool_loop(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**OPTIONS, tools=TOOLS, tool_choice="required", seed=5)
    message = answer.choices[0].message
    results = [{"role": "tool", "tool_call_id": call.id, "content": "done"} for call in message.tool_calls or ()]
    again = client.chat.completions.create(
        model="parrot", messages=[*ASK, message, *results], temperature=0, tools=TOOLS
    )
    assert again.choices[0].message.content == "小鱼 swims"


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "fish"},
        {"type": "object", "properties": 3},
        {"type": "string", "pattern": "("},
        {"$ref": "https://example.org/schema"},
    ],
)
def test_schemas_that_cannot_be_followed(client: openai.OpenAI, schema: dict[str, Any]) -> None:
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError) as raised:
        client.chat.completions.create(**OPTIONS, response_format=shape)
    assert raised.value.param == "response_format"
    if schema["type" if "type" in schema else "$ref"] != "string":
        broken: Any = {"type": "function", "function": {"name": "f", "parameters": {"properties": {"a": schema}}}}
        with pytest.raises(openai.BadRequestError) as raised:
            client.chat.completions.create(**OPTIONS, tools=[broken])
        assert raised.value.param == "tools"


def test_arguments_are_an_object(client: openai.OpenAI) -> None:
    options = OPTIONS | {"tool_choice": "required", "seed": 0}
    for kind in ("string", ["string", "null"], [], None, {"object": 1}):
        function: Any = {"type": "function", "function": {"name": "f", "parameters": {"type": kind}}}
        with pytest.raises(openai.BadRequestError, match="arguments are an object") as raised:
            client.chat.completions.create(**options, tools=[function])
        assert raised.value.param == "tools"
    swim: Any = tool("swim", fast=FLAG)
    swim["function"]["parameters"]["type"] = ["null", "object"]
    answer = client.chat.completions.create(**options, tools=[swim], parallel_tool_calls=False)
    (call,) = answer.choices[0].message.tool_calls or ()
    assert call.type == "function"
    check("swim", json.loads(call.function.arguments))


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_off_before_its_name_is_no_content(client: openai.OpenAI, stream: bool) -> None:
    options = OPTIONS | {"tools": TOOLS, "tool_choice": "required", "seed": 3, "max_tokens": 6}
    if stream:
        choices = [chunk.choices[0] for chunk in client.chat.completions.create(**options, stream=True)]
        assert "".join(choice.delta.content or "" for choice in choices) == ""
        assert choices[-1].finish_reason == "length"
    else:
        (choice,) = client.chat.completions.create(**options).choices
        assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == ("", None, "length")


def test_a_call_cut_off_after_its_name_ends_for_its_length(client: openai.OpenAI) -> None:
    options = OPTIONS | {"tools": TOOLS, "tool_choice": "required", "seed": 3}
    whole = client.chat.completions.create(**options)
    (choice,) = whole.choices
    assert choice.finish_reason == "tool_calls"
    assert whole.usage is not None
    for tokens in range(whole.usage.completion_tokens - 1, 0, -1):  # until the first call has not got its end
        (cut,) = client.chat.completions.create(**options | {"max_tokens": tokens}).choices
        assert cut.finish_reason == "length"
        if cut.message.tool_calls and len(cut.message.tool_calls) == 1:
            break
    assert cut.message.tool_calls


@pytest.mark.parametrize("stream", [False, True])
def test_a_call_cut_off_by_a_stop_string_ends_for_that(client: openai.OpenAI, stream: bool) -> None:
    """finish_reason tool_calls says that the arguments are whole: clients read them as JSON."""
    request: Any = {"model": "wide", "messages": ASK, "tools": [tool("swim", fast=FLAG)], "tool_choice": "required"}
    answer = client.chat.completions.create(**request, max_tokens=80, stop=["true", "false"], stream=stream)
    if stream:
        assert [choice.finish_reason for chunk in answer for choice in chunk.choices][-1] == "stop"
    else:
        assert answer.choices[0].finish_reason == "stop"
        assert answer.choices[0].message.tool_calls[0].function.arguments == '{"fast": '


def test_a_deep_schema_is_refused(client: openai.OpenAI) -> None:
    schema: dict[str, Any] = {"type": "string"}
    for _ in range(400):
        schema = {"type": "object", "properties": {"a": schema}}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(**OPTIONS, response_format=shape)


def test_a_stream_names_the_field_whose_schema_cannot_be_followed(client: openai.OpenAI) -> None:
    """As the error of a whole answer does; behind a thought that shows only at its end."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    extra = {"chat_template_kwargs": {"enable_thinking": True}}
    options = OPTIONS | {"response_format": shape, "extra_body": extra, "logit_bias": {"7": 100}}
    with pytest.raises(openai.APIError, match="cannot be followed") as raised:
        list(client.chat.completions.create(**options, stream=True))
    assert raised.value.param == "response_format"


@pytest.mark.parametrize("late", [False, True])
def test_a_schema_too_wide_for_the_parser_costs_nobody_elses_answer(client: openai.OpenAI, late: bool) -> None:
    """500 optional strings: valid, but more than llguidance follows; behind a thought that shows only at its end."""
    schema = {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}}
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}
    extra = {"chat_template_kwargs": {"enable_thinking": late}}
    options = OPTIONS | {"extra_body": {"ignore_eos": True}, "max_tokens": 300}
    with client.chat.completions.create(**options, stream=True) as stream:
        next(iter(stream))
        with pytest.raises(openai.BadRequestError, match="cannot be followed") as raised:
            client.chat.completions.create(**OPTIONS, response_format=shape, extra_body=extra, logit_bias={"7": 100})
        assert len(str(raised.value)) < 600
        assert raised.value.param == "response_format"
        *_, last = stream
    assert last.choices[0].finish_reason == "length"


def test_the_grammar_with_tools_and_a_schema(running: Running) -> None:
    """Either a call or JSON: one rule each, in the order in which the model may choose."""
    tokenizer = running.engines["noise"].engine.tokenizer
    body = ChatBody(model="m", messages=ASK, tools=TOOLS, response_format={"type": "json_object"})  # type: ignore[arg-type]
    grammar = answer_grammar(tokenizer, body)
    assert grammar is not None
    assert 'answer: content | call ("\\n" call)*' in grammar
    both = body.model_dump() | {"tool_choice": {"type": "allowed_tools", "allowed_tools": {"mode": "auto"}}}
    both["response_format"] = None
    for names in (["swim"], ["grow-up"], ["grow-up", "swim"]):
        both["tool_choice"]["allowed_tools"]["tools"] = [{"type": "function", "function": {"name": n}} for n in names]
        some = answer_grammar(tokenizer, ChatBody.model_validate(both)) or ""
        assert 'answer: content (call ("\\n" call)*)?' in some
        assert [name for name in ("grow-up", "swim") if name in some] == names
    assert answer_grammar(tokenizer, ChatBody(model="m", messages=ASK)) is None
