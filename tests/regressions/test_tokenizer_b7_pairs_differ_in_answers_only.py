"""B7: empty think blocks were dropped at random, apart for the chosen and the rejected answer of a pair, so that a
third of the pairs differed by tags. Rendering has no chance in it: a pair differs where the answers differ."""

from __future__ import annotations

from minnow.tokenizer import Conversation, Message, render, train_tokenizer


def test_a_pair_differs_in_its_answers_only() -> None:
    tokenizer = train_tokenizer(["a pond and a fish"], 300)
    prompt = (Message("system", "s"), Message("user", "q"), Message("assistant", "a"), Message("user", "r"))
    served = render(tokenizer, Conversation(prompt), add_generation_prompt=True).ids.tolist()
    chosen, rejected = (
        render(tokenizer, Conversation((*prompt, Message("assistant", answer)))).ids.tolist()
        for answer in ("yes", "no")
    )
    assert chosen[: len(served)] == rejected[: len(served)] == served
    end = [tokenizer.im_end_id, *tokenizer.encode("\n")]
    assert chosen[len(served) :] == [*tokenizer.encode("yes"), *end]
    assert rejected[len(served) :] == [*tokenizer.encode("no"), *end]
