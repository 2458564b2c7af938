"""Rows of every format, and what is said of bad ones."""

import json
from contextlib import suppress
from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minnow.data.records import canonical, conversation_row, parse_conversation, parse_document
from minnow.data.values import RowError
from minnow.tokenizer.chat import Message, ToolCall

HELLO = (Message(role="user", content="hi"), Message(role="assistant", content="hello"))
CALL = ToolCall(name="add", arguments={"a": 1})
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def chat(*turns, **row):
    return {"conversations": [{"role": role, **message} for role, message in turns], **row}


@pytest.mark.parametrize("row", [{"text": "a"}, {"content": "a"}, {"text": "a", "content": "b"}, {"text": "a", "n": 1}])
def test_pretraining_rows(row):
    assert parse_document(row).text == "a"


ROWS_OF_HELLO = {
    "minimind": {"conversations": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    "messages": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "hello"}]},
    "belle": {"conversations": [{"from": "human", "value": "hi"}, {"from": "assistant", "value": "hello"}]},
    "json": {"conversations": '[{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]'},
    "alpaca": {"instruction": "hi", "input": "", "output": "hello"},
    "hf features": {
        "conversations": [
            {"role": r, "content": c, "reasoning_content": None, "tools": None, "tool_calls": ""}
            for r, c in (("user", "hi"), ("assistant", "hello"))
        ]
    },
    "sharegpt and openai put together": {
        "conversations": [
            {"role": None, "content": None, "from": f, "value": v} for f, v in (("human", "hi"), ("gpt", "hello"))
        ]
    },
    "parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "hello"},
        ]
    },
}


@pytest.mark.parametrize("name", ROWS_OF_HELLO)
def test_one_conversation_in_every_format(name):
    conversation = parse_conversation(ROWS_OF_HELLO[name])
    assert conversation.messages == HELLO
    assert conversation.tools == ()
    assert canonical(conversation) == canonical(parse_conversation(ROWS_OF_HELLO["alpaca"]))


def test_alpaca_with_everything():
    history = [["hi", "hello"], ["how?", "well"]]
    row = {"instruction": "Add", "input": "1 2", "output": "3", "system": "Be brief.", "history": history}
    assert [(m.role, m.content) for m in parse_conversation(row).messages] == [
        ("system", "Be brief."),
        *(("user", "hi"), ("assistant", "hello")),
        *(("user", "how?"), ("assistant", "well")),
        *(("user", "Add\n1 2"), ("assistant", "3")),
    ]


@pytest.mark.parametrize("opening", [[], [("system", {"content": "Be brief."})]])
@pytest.mark.parametrize("system", ["Be brief.", [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}]])
def test_a_system_prompt_beside_the_messages(opening, system):
    """LLaMA-Factory's ShareGPT rows have it in a column of its own, Anthropic's requests too, in parts; it was dropped
    without a word."""
    row = chat(*opening, ("user", {"content": "u"}), ("assistant", {"content": "a"}), system=system)
    messages = parse_conversation(row).messages
    assert [m.role for m in messages] == ["system", "user", "assistant"]
    assert messages[0].content == "Be brief."


@pytest.mark.parametrize("system", [None, "", " ", True])
def test_no_system_prompt_beside_the_messages(system):
    row = chat(("user", {"content": "u"}), ("assistant", {"content": "a"}), system=system)
    assert [m.role for m in parse_conversation(row).messages] == ["user", "assistant"]


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("key", ["tools", "functions"])
@pytest.mark.parametrize("place", ["row", "system"])
def test_tools(as_json, key, place):
    tools = json.dumps([TOOL]) if as_json else [TOOL]
    row = chat(("system", {"content": "s"}), ("user", {"content": "u"}), ("assistant", {"content": "a"}))
    (row if place == "row" else row["conversations"][0])[key] = tools
    assert parse_conversation(row).tools == (TOOL,)
    row["conversations"][0]["role"] = "System"
    assert parse_conversation(row).tools == (TOOL,)


@pytest.mark.parametrize(
    "calls",
    [
        [{"name": "add", "arguments": {"a": 1}}],
        '[{"name": "add", "arguments": {"a": 1}}]',
        {"name": "add", "arguments": '{"a": 1}'},
        [{"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}],
        [{"name": "add", "parameters": {"a": 1}}],
    ],
)
@pytest.mark.parametrize("key", ["tool_calls", "function_call"])
def test_tool_calls(calls, key):
    call = ("assistant", {"content": None, "tool_calls": None, key: calls})
    messages = parse_conversation(chat(("user", {"content": "u"}), call, ("tool", {"content": "2"}))).messages
    assert messages[1] == Message(role="assistant", content="", tool_calls=(CALL,))
    assert messages[2] == Message(role="tool", content="2")


def test_sharegpt_calls_are_turns():
    call = '{"name": "add", "arguments": {"a": 1}}'
    turns = [("human", "u"), ("function_call", call), ("observation", "2"), ("gpt", "2")]
    messages = parse_conversation({"conversations": [{"from": f, "value": v} for f, v in turns]}).messages
    assert [m.role for m in messages] == ["user", "assistant", "tool", "assistant"]
    assert messages[1].tool_calls == (CALL,)


@pytest.mark.parametrize(
    "turn",
    [
        {"value": '{"name": "add", "arguments": {"a": 1}}', "reasoning_content": "1 first."},
        {"value": '<think>\n1 first.\n</think>\n{"name": "add", "arguments": {"a": 1}}'},
    ],
)
def test_sharegpt_calls_keep_their_thoughts(turn):
    """One was dropped without a word, the other refused; LLaMA-Factory reads the text's."""
    turns = [{"from": "human", "value": "u"}, {"from": "function_call", **turn}, {"from": "observation", "value": "2"}]
    message = parse_conversation({"conversations": turns}).messages[1]
    assert message == Message("assistant", "", "1 first.", (CALL,))


@pytest.mark.parametrize(
    ("message", "reasoning", "content"),
    [
        ({"content": "4", "reasoning_content": "2+2"}, "2+2", "4"),
        ({"content": "<think>\n2+2\n</think>\n<answer>\n4\n</answer>"}, "2+2", "4"),
        ({"content": "<think>\n2+2\n</think>\n\n4"}, "2+2", "4"),
        ({"content": "<think>\n\n</think>\n\n4"}, None, "4"),
        ({"content": "<think>a</think>b<think>c</think>"}, "a", "b<think>c</think>"),
        ({"content": "They write <think>x</think>."}, None, "They write <think>x</think>."),
        ({"content": "<think>kept</think>4", "reasoning_content": "r"}, "r", "<think>kept</think>4"),
        ({"content": "4", "reasoning_content": ""}, None, "4"),
        ({"content": "4", "reasoning": "2+2"}, "2+2", "4"),
        ({"content": "4", "reasoning_content": None, "thinking": "2+2"}, "2+2", "4"),
        ({"content": "4", "reasoning": "2+2", "thinking": "2+2"}, "2+2", "4"),
    ],
)
def test_reasoning_is_split_once_and_only_at_the_start(message, reasoning, content):
    answer = parse_conversation(chat(("user", {"content": "?"}), ("assistant", message))).messages[1]
    assert (answer.reasoning_content, answer.content) == (reasoning, content)


def test_a_user_is_never_read_for_tags():
    row = chat(("user", {"content": "<think>x</think>y"}), ("assistant", {"content": "z"}))
    assert parse_conversation(row).messages[0] == Message(role="user", content="<think>x</think>y")


U = ("user", {"content": "u"})
A = ("assistant", {"content": "a"})
BAD_CONVERSATIONS = [
    (chat(A), "starts with the assistant"),
    (chat(("system", {"content": "s"}), A, U), "starts with the assistant"),
    (chat(("tool", {"content": "s"}), A), "starts with a tool result"),
    (chat(U), "no supervised token: the conversation has no assistant message"),
    (chat(U, ("assistant", {"content": "  "})), "no supervised token: every assistant message is empty"),
    (chat(), "the conversation is empty"),
    (chat(U, ("assistant", {})), r"message 2 \(assistant\) has no `content`"),
    (chat(U, ("assistant", {"content": 3})), "`content` of message 2 must be text, it is a number"),
    (chat(U, ("narrator", {"content": "a"})), 'message 2 has role "narrator"; known are system'),
    (
        chat(U, ("assistant", {"content": "a", "reasoning": "r", "thinking": "t"})),
        "`reasoning` and `thinking` of message 2 are different thoughts",
    ),
    ({"conversations": "[{"}, "`conversations` is not valid JSON"),
    ({"conversations": "[" * 9999}, "`conversations` is not valid JSON"),
    (chat(U, A, tools="[%s]" % ("9" * 5000)), "`tools` is not valid JSON"),
    ({"conversations": {"a": 1}}, "must be a list of messages, it is an object"),
    ({"conversations": ["hi"]}, "message 1 must be an object with `role` and `content`, it is text"),
    (chat(U, ("assistant", {"content": "", "tool_calls": "{"})), "`tool_calls` of message 2 is not valid JSON"),
    (chat(U, ("assistant", {"content": "", "tool_calls": [{"x": 1}]})), "a tool call of message 2 has no `name`"),
    (
        chat(U, ("assistant", {"content": "", "tool_calls": [{"name": "f", "arguments": "[1]"}]})),
        "`arguments` of f in message 2 must be an object, not a list",
    ),
    (
        chat(U, ("assistant", {"content": "", "tool_calls": [{"name": "f", "arguments": {"day": date(2024, 5, 6)}}]})),
        "`arguments` of f in message 2 hold what JSON cannot: Object of type date",
    ),
    (
        chat(U, A, tools=[{"name": "f", "since": date(2024, 5, 6)}]),
        "`tools` hold what JSON cannot: Object of type date",
    ),
    (chat(U, A, tools="[1]"), "`tools` must be a list of objects"),
    (chat(U, A, tools=[{"type": "code_interpreter"}]), "tool 1 of `tools` has no `name`"),
    (chat(U, A, functions=[{"name": "f"}, {"name": ""}]), "tool 2 of `functions` has no `name`"),
    (chat(U, A, tools=[{"type": "function", "function": {"description": "d"}}]), "tool 1 of `tools` has no `name`"),
    (chat(U, A, tools=[{"function": "f"}]), "tool 1 of `tools` has no `name`"),
    (chat(("system", {"content": "s", "tools": [TOOL]}), U, A, tools=[{"name": "other"}]), "two different lists"),
    (chat(("system", {"content": "s"}), U, A, system="other"), "two different system messages"),
    ({"instruction": "i"}, "an `instruction` without an `output`"),
    ({"chosen": [], "rejected": []}, "only `chosen`, `rejected`; it looks like a preference pair"),
    ({"text": "x"}, "it looks like a text, which is for `minnow pretrain`"),
    ({"input_ids": [1]}, "ids of another tokenizer cannot be used"),
    ({"prompt": "q", "completion": "a"}, "write a question and its answer as `instruction` and `output`"),
    ({}, "only nothing"),
    (chat(U, ("assistant", {"content": "a", "weight": 0.5})), "`weight` of message 2 must be 0"),
    (chat(U, ("assistant", {"content": "a", "weight": 0})), "every assistant message has weight 0"),
    (
        chat(U, ("assistant", {"content": "a", "weight": 0}), U, ("assistant", {"content": ""})),
        "every assistant message is empty or has weight 0",
    ),
    (chat(("user", {"content": "\ud83d"}), A), r"not valid Unicode: \\ud83d at character 0 is half a pair"),
]


def test_an_answer_of_weight_0_is_read_and_not_learnt():
    """OpenAI's fine-tuning format; a table gives null where a row says nothing of it."""
    bad, good = ("assistant", {"content": "bad", "weight": 0}), ("assistant", {"content": "good", "weight": None})
    conversation = parse_conversation(chat(U, bad, U, good))
    assert [message.weight for message in conversation.messages] == [1, 0, 1, 1]
    assert parse_conversation(conversation_row(conversation)) == conversation
    always = parse_conversation(chat(U, ("assistant", {"content": "bad"}), U, good))
    assert canonical(conversation) == canonical(always), "on one side of the split with it"
    called = ("function_call", {"content": '{"name": "look_up"}', "weight": 0})  # ShareGPT's turn of its own
    assert [message.weight for message in parse_conversation(chat(U, called, U, A)).messages] == [1, 0, 1, 1]


@pytest.mark.parametrize(("row", "message"), BAD_CONVERSATIONS)
def test_bad_conversations_are_explained(row, message):
    with pytest.raises(RowError, match=message):
        parse_conversation(row)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "`text` is empty"),
        ({"text": " \n"}, "`text` is empty"),
        ({"text": 3}, "`text` must be text, it is a number"),
        ({"content": ["a"]}, "`content` must be text, it is a list"),
        ({"body": "x"}, "no `text` or `content`, only `body`"),
        ({"text": None, "id": 1}, "^`text` is null$"),
        ({"messages": []}, "it looks like a conversation, which is for `minnow sft`"),
        ({"text": "a\udc00"}, "half a pair"),
    ],
)
def test_bad_documents_are_explained(row, message):
    with pytest.raises(RowError, match=message):
        parse_document(row)


KEYS = ["text", "content", "conversations", "messages", "role", "from", "value", "tools", "tool_calls", "function"]
KEYS += ["name", "arguments", "instruction", "input", "output", "history", "system", "type"]
KEYS += ["reasoning_content", "thinking", "image", "images", "image_bytes", "image_url", "url", "caption"]
WORDS = ["user", "assistant", "gpt", "human", "system", "tool", "function_call", "[]", "{}", "text", "image", "<image>"]
WORDS = st.sampled_from(WORDS)
LEAVES = st.none() | st.booleans() | st.integers() | WORDS | st.text(max_size=5)
MESSAGES = st.fixed_dictionaries({"role": WORDS, "content": LEAVES | st.lists(LEAVES, max_size=2)})


def _objects(inner):
    objects = st.dictionaries(st.sampled_from(KEYS), inner, max_size=5)
    return st.lists(inner, max_size=3) | objects | objects.map(json.dumps)


VALUES = st.recursive(LEAVES | MESSAGES, _objects, max_leaves=12)


@given(st.dictionaries(st.sampled_from(KEYS), VALUES | st.lists(MESSAGES | VALUES, max_size=4), max_size=6))
@settings(max_examples=400, deadline=None)
def test_any_object_is_read_or_refused_with_words(row):
    for parse in (parse_document, parse_conversation):
        with suppress(RowError):
            assert canonical(parse(row))


def test_a_developers_message_may_declare_the_tools():
    """OpenAI's newer name for the system."""
    tool = {"name": "look_up"}
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "The owl."}]
    row = {"messages": [{"role": "developer", "content": "Be brief.", "tools": [tool]}, *turns]}
    assert parse_conversation(row).tools == ({"type": "function", "function": tool},)


def test_what_differs_in_anything_that_a_model_reads_is_another_content():
    """By it answers are found again, and documents fall on a side of the split."""
    call = {"name": "weather", "arguments": {"city": "Ulm"}}

    def content(tools=(), **answer):
        messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello", **answer}]
        return canonical(parse_conversation({"messages": messages, "tools": list(tools)}))

    contents = [
        content(),
        content(content="ho"),
        content(reasoning_content="hm"),
        content(tool_calls=[call]),
        content(tool_calls=[call | {"arguments": {"city": "Bonn"}}]),
        content(tools=[{"name": "weather"}]),
    ]
    assert len(set(contents)) == len(contents)
