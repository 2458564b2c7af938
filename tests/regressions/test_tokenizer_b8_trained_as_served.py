"""B8: fine-tuning dropped the empty think block in 80% of the turns while serving always wrote it, and reasoning of
earlier turns stayed in the prompt."""

from __future__ import annotations

import json

import pytest

from minnow.data.pairs import parse_preference
from minnow.data.prompts import parse_prompt
from minnow.data.records import parse_conversation
from minnow.serving.prompts import chat_prompt
from minnow.serving.requests import ChatBody
from minnow.tokenizer import Conversation, Message, render, train_tokenizer, training_examples

TOKENIZER = train_tokenizer(["a pond and a fish\n\n\n\n"], 300)
ROW = Conversation(
    (
        Message("user", "q"),
        Message("assistant", "a", "first thought"),
        Message("user", "r"),
        Message("assistant", "b", "second thought"),
        Message("user", "s"),
        Message("assistant", "\n\nc"),
    )
)


def test_every_trained_turn_stands_behind_the_prompt_it_is_served_behind() -> None:
    examples = training_examples(TOKENIZER, ROW)
    assert len(examples) == 3
    for example, turn in zip(examples, (1, 3, 5), strict=True):
        thinking = ROW.messages[turn].reasoning_content is not None
        before = Conversation(ROW.messages[:turn])
        prompt = render(TOKENIZER, before, add_generation_prompt=True, enable_thinking=thinking).ids
        assert example.ids[: len(prompt)].tolist() == prompt.tolist()
        assert example.weights[len(prompt)] == 1.0


def test_earlier_reasoning_is_not_in_the_prompt() -> None:
    text = TOKENIZER.decode(render(TOKENIZER, ROW).ids)
    assert "thought" not in text
    assert text.count("<think>\n\n</think>\n\n") == 3


FUNCTION = {"name": "look_up", "description": "Finds it.", "parameters": {"type": "object", "properties": {}}}
WRAPPED = {"type": "function", "function": FUNCTION}


@pytest.mark.parametrize(
    "tools",
    [
        [WRAPPED],
        [FUNCTION],
        json.dumps([FUNCTION]),
        [{"function": FUNCTION, "type": "function"}],
        [{"function": FUNCTION}],
        [{"type": "function", **FUNCTION}],
    ],
)
def test_functions_are_described_in_training_as_the_server_describes_them(tools: object) -> None:
    """Most public rows leave OpenAI's wrapper out; a client cannot, so the model would meet it first when it serves."""
    question, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    body = ChatBody.model_validate({"model": "m", "messages": [question], "tools": [WRAPPED]})
    served = chat_prompt(TOKENIZER, body).ids.tolist()
    (example,) = training_examples(TOKENIZER, parse_conversation({"messages": [question, answer], "tools": tools}))
    assert example.ids[: len(served)].tolist() == served
    holder = {"role": "system", "content": "", "tools": tools}  # as minimind's rows have them
    (example,) = training_examples(TOKENIZER, parse_conversation({"messages": [holder, question, answer]}))
    assert example.ids[: len(served)].tolist() == served
    for row in ({"prompt": "q", "tools": tools}, {"conversations": [holder, question, answer]}):
        asked = parse_prompt(row).conversation
        assert render(TOKENIZER, asked, add_generation_prompt=True).ids.tolist() == served
    sides = {side: [holder, question, {"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    for rendered in parse_preference(sides).render(TOKENIZER):
        assert rendered.ids[: len(served)].tolist() == served
