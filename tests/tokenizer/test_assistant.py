"""Answers taken apart token by token, against the parser of whole answers."""

from __future__ import annotations

import json
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minnow.engine.stop_strings import StopStrings
from minnow.tokenizer import StreamDecoder, Tokenizer, parse_assistant_ids, train_tokenizer
from minnow.tokenizer.assistant import AssistantStream, Content, Event, Reasoning
from minnow.tokenizer.pieces import Piece, PieceStream
from minnow.tokenizer.tool_calls import CallArguments, CallBegins

MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")


@cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["the little minnow swims in the pond. 小鱼在池塘里游泳。"] * 10, 320)


def ids_of(script: str) -> list[int]:
    """`§<think>§` is the control token, `<think>` the text."""
    ids: list[int] = []
    for i, part in enumerate(script.split("§")):
        ids += [tokenizer().special_ids[part]] if i % 2 else tokenizer().encode(part)
    return ids


def stream(ids: list[int], *, stop: tuple[str, ...] = (), **options: bool) -> list[Event]:
    """What the server makes of deltas such as the engine gives."""
    decoder, stops = StreamDecoder(tokenizer(), skip_special_tokens=True), StopStrings(stop)
    pieces: PieceStream = PieceStream(tokenizer())
    assistant = AssistantStream(**({"thinking": False, "tools": True} | options))
    events: list[Event] = []
    for index in ids:
        text = stops.push(decoder.push(index))
        last = stops.found
        for piece in pieces.push([index], [None], text):
            events += assistant.push(piece)
        if last:
            break
    else:
        for piece in pieces.push([], [], stops.finish()):
            events += assistant.push(piece)
    return [*events, *assistant.finish()]


def joined(events: list[Event]) -> tuple[str, str, list[tuple[str, str]]]:
    """(reasoning, content, [(name, arguments)])."""
    calls: list[tuple[str, str]] = []
    for event in events:
        if isinstance(event, CallBegins):
            assert event.index == len(calls)
            calls.append((event.name, ""))
        elif isinstance(event, CallArguments):
            assert event.index == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + event.text)
    reasoning = "".join(event.text for event in events if isinstance(event, Reasoning))
    content = "".join(event.text for event in events if isinstance(event, Content))
    return reasoning, content, calls


CALL = '§<tool_call>§\n{"name": "add", "arguments": {"a": [1, {"b": "}\\"小"}], "c": 2}}\n§</tool_call>§'
ARGUMENTS = '{"a": [1, {"b": "}\\"小"}], "c": 2}'


def test_reasoning_content_and_calls_come_apart() -> None:
    script = f"\nI think 小鱼\n§</think>§\n\nLook:\n{CALL}\n{CALL}"
    events = stream(ids_of(script), thinking=True)
    assert joined(events) == ("I think 小鱼", "Look:", [("add", ARGUMENTS)] * 2)
    # Arguments stream: they come in many pieces, after the name.
    assert sum(isinstance(event, CallArguments) for event in events) > 10


def test_text_that_spells_a_tag_is_text() -> None:
    script = '<think>x</think><tool_call>{"name": "f", "arguments": {}}</tool_call>'
    assert joined(stream(ids_of(script))) == ("", script, [])


def test_without_tools_a_call_is_text() -> None:
    reasoning, content, calls = joined(stream(ids_of(f"a\n{CALL}"), tools=False))
    assert calls == []
    assert content == f"a\n{CALL}".replace("§", "")
    assert reasoning == ""


def test_a_call_that_is_cut_off_is_told_as_far_as_it_goes() -> None:
    assert joined(stream(ids_of('§<tool_call>§\n{"name": "f", "arguments": {"a": 1'))) == ("", "", [("f", '{"a": 1')])
    for cut in ("", '\n{"name": "f"', '\n{"name": "f", "argumen'):  # no name yet: its markup is no content
        assert joined(stream(ids_of(f"§<tool_call>§{cut}"))) == ("", "", [])
        assert joined(stream(ids_of(f"x\n§<tool_call>§{cut}"))) == ("", "x", [])
        assert joined(stream(ids_of(f"{CALL}\n§<tool_call>§{cut}"))) == ("", "", [("add", ARGUMENTS)])


def test_whole_calls_are_told_at_their_end_and_what_is_none_is_text() -> None:
    events = stream(ids_of(f"a\n{CALL}\n{CALL}"), whole_calls=True)
    assert joined(events) == ("", "a", [("add", ARGUMENTS)] * 2)
    assert sum(isinstance(event, CallArguments) for event in events) == 2
    for script in ('x\n§<tool_call>§\n{"name": "f", "arguments": {"a": 1', "§<tool_call>§{nonsense}§</tool_call>§",
                   "x\n§<tool_call>§", "x §<tool_call>§§</tool_call>§ y",
                   '§<tool_call>§{"name": "f", "arguments": {"a": }}§</tool_call>§'):  # fmt: skip
        assert joined(stream(ids_of(script), whole_calls=True)) == ("", script.replace("§", ""), [])


def test_odd_calls_are_read_whole_and_broken_ones_stay() -> None:
    odd = '§<tool_call>§{"arguments": {"a": 1}, "name": "f"}§</tool_call>§'
    assert joined(stream(ids_of(odd))) == ("", "", [("f", '{"a": 1}')])
    for broken in ("x\n§<tool_call>§{nonsense}§</tool_call>§ y", "x\n§<tool_call>§§</tool_call>§ y"):
        assert joined(stream(ids_of(broken))) == ("", broken.replace("§", ""), [])


def test_a_tag_inside_a_call_opens_another_only_where_it_is_a_control_token() -> None:
    """The text of one did, and what stood before it was lost."""
    call = '{"name": "f", "arguments": {}}'
    for opening in ("", "junk", "junk\n", "§<tool_call>§", '{"name": "g", "arguments": 3}', '{"arguments": {"a": "'):
        for tag in ("§<tool_call>§", "<tool_call>"):
            ids = ids_of(f"x §<tool_call>§{opening}{tag}{call}§</tool_call>§")
            message = parse_assistant_ids(tokenizer(), ids)
            assert len(message.tool_calls) == (1 if "§" in tag else 0)
            for whole_calls in (True, False):
                _, content, calls = joined(stream(ids, whole_calls=whole_calls))
                assert (content, [name for name, _ in calls]) == (message.content, ["f"] * len(message.tool_calls))


def test_half_a_surrogate_pair_in_a_call_can_be_sent() -> None:
    """It has no UTF-8: the answer was a 500."""
    for call in (
        '{"name": "f\\ud83d", "arguments": {"a": "\\ud83d"}}',
        '{"arguments": {"a": "\\ud83d"}, "name": "f\\ud83d"}',
    ):
        events = stream(ids_of(f"§<tool_call>§{call}§</tool_call>§"))
        assert joined(events) == ("", "", [("f\ufffd", '{"a": "\\ud83d"}')])


def test_a_name_that_is_no_json_is_text() -> None:
    """It ended the answer with a JSONDecodeError."""
    for name in ("f\\q", "f\ng", "f\\u12"):
        script = f'§<tool_call>§{{"name": "{name}", "arguments": {{}}}}§</tool_call>§'
        assert joined(stream(ids_of(script))) == ("", script.replace("§", ""), [])


@pytest.mark.parametrize("stop", ["k>", "<think>", "/think>\n", ">\n\n", "pond"])
def test_stop_strings_that_overlap_tags(stop: str) -> None:
    """Text that the engine holds back for a stop string still finds its token."""
    ids = ids_of("\nhm\n§</think>§\n\nthe pond.")
    decoder = StreamDecoder(tokenizer(), skip_special_tokens=True)
    whole = "".join(decoder.push(i) for i in ids)
    kept = whole.split(stop)[0]
    reasoning, _, answer = kept.partition("</think>")
    if "</think>" not in kept:
        reasoning = kept.split("<")[0]  # half a control token is nothing
    said, content, _ = joined(stream(ids, thinking=True, stop=(stop,)))
    assert (said, content) == (reasoning.strip(), answer.lstrip())


_TEXTS = st.sampled_from(
    ["", " ", "\n", "hello", "小鱼 ", "a\n", "\n\nb", "{}", '{"name": "f", "arguments": {"x": 1}}']
)
_CALLS = st.sampled_from([
    '§<tool_call>§\n{"name": "f", "arguments": {"x": "}"}}\n§</tool_call>§',
    '§<tool_call>§{"name": "g", "arguments": {}}§</tool_call>§',
    '§<tool_call>§{"name": 3, "arguments": {}}§</tool_call>§',
    '§<tool_call>§§</tool_call>§',
])  # fmt: skip


_THINK, _END_THINK = st.just("§<think>§"), st.just("§</think>§")


@given(
    st.sampled_from(["", "§<think>§", "\n§<think>§"]),
    st.booleans(),
    st.lists(st.one_of(_TEXTS, _THINK), max_size=3),
    st.lists(st.one_of(_TEXTS, _CALLS, _THINK, _END_THINK), max_size=6),
)
@settings(max_examples=300, deadline=None)
def test_equals_the_parser_of_whole_answers(opening: str, thinking: bool, thoughts: list[str], said: list[str]) -> None:
    """But for a `</think>` that nothing opened, which the stream cannot foresee."""
    if thinking or opening:
        script = "".join([opening, *thoughts, "§</think>§", *said])
    else:
        script = "".join(said).replace("§</think>§", "")
    ids = ids_of(script)
    message = parse_assistant_ids(tokenizer(), ids, thinking=thinking)
    reasoning, content, calls = joined(stream(ids, thinking=thinking))
    assert reasoning == (message.reasoning_content or "")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        (call.name, call.arguments) for call in message.tool_calls
    ]
    if "<" in content:  # white space around a broken call and a tag that is text stays here and goes there
        assert "".join(content.split()) == "".join(message.content.split())
    else:
        assert content == message.content


@pytest.mark.parametrize(
    ("script", "thinking", "reasoning", "content"),
    [
        ("§<think>§§</think>§§<think>§x§</think>§", False, "", "<think>x</think>"),
        ("§</think>§§<think>§x§</think>§y", True, "", "<think>x</think>y"),
        ("§<think>§x§</think>§y", True, "x", "y"),  # the prompt had opened them
        ("§<think>§§<think>§x§</think>§y", True, "<think>x", "y"),
        ("§<think>§§<think>§x§</think>§y", False, "<think>x", "y"),
        ("§<think>§<think>x§</think>§y", False, "<think>x", "y"),  # text that spells the tag
        ("<think>x§</think>§y", True, "<think>x", "y"),
        ("§<tool_call>§§</tool_call>§§<think>§x", False, "", "<tool_call></tool_call><think>x"),
    ],
)
def test_thoughts_are_opened_once(script: str, thinking: bool, reasoning: str, content: str) -> None:
    """Streamed, what stood behind empty thoughts was more of them; and the text of a tag was lost to the whole one."""
    ids = ids_of(script)
    assert joined(stream(ids, thinking=thinking)) == (reasoning, content, [])
    message = parse_assistant_ids(tokenizer(), ids, thinking=thinking)
    assert (message.reasoning_content or "", message.content) == (reasoning, content)


def test_nothing_behind_a_call_is_thought() -> None:
    assert joined(stream(ids_of(f"{CALL}§<think>§x"))) == ("", "<think>x", [("add", ARGUMENTS)])


def test_a_think_tag_behind_a_first_token_that_ends_a_line_is_text() -> None:
    """The token, held back for its line break, was lost, and the rest taken for thoughts."""
    assistant: AssistantStream = AssistantStream(thinking=False, tools=True)
    events: list[Event] = []
    for text, mark in (("}\n", False), ("<think>", True), ("hm", False)):
        events += assistant.push(Piece(text, mark, None))
    assert joined([*events, *assistant.finish()]) == ("", "}\n<think>hm", [])
