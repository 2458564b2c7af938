"""B8: fine-tuning dropped the empty think block in 80% of the turns while serving always wrote it, and reasoning of
earlier turns stayed in the prompt."""

from __future__ import annotations

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
