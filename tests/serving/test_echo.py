"""`echo` of /v1/completions: the prompt before the answer, with its log-probabilities, as the harnesses ask for it."""

from __future__ import annotations

from typing import Any

import httpx
import openai
import pytest
import torch
from openai.types.completion_choice import Logprobs

from minnow.model.attention import CausalAttention

from .serving_helpers import Running

TEXTS = ["the little minnow swims", "小鱼 in the pond"]


def logprobs_of(running: Running, ids: list[int]) -> torch.Tensor:
    """[T, V] of the training module: row t for the token behind ids[t]."""
    model = running.engines["noise"].engine.model
    with torch.no_grad():
        hidden = model(torch.tensor([ids]), torch.arange(len(ids))[None], CausalAttention())
        return model.logits(hidden)[0].log_softmax(-1)


def assert_right(running: Running, found: Logprobs | None, read: list[int], sent: int, text: str) -> None:
    """read: prompt and answer as the model reads them. sent: how many of them the client knows of, the last ones.
    text: the prompt's."""
    assert found is not None
    assert found.tokens is not None
    assert found.token_logprobs is not None
    assert found.top_logprobs is not None
    assert found.text_offset is not None
    first = len(read) - sent
    assert len(found.tokens) == len(found.token_logprobs) == len(found.top_logprobs) == len(found.text_offset) == sent
    assert found.token_logprobs[0] is None
    assert found.top_logprobs[0] is None
    expected = logprobs_of(running, read)
    for place in range(1, sent):
        row, token = expected[first + place - 1], read[first + place]
        assert found.token_logprobs[place] == pytest.approx(row[token].item(), abs=1e-4)
        likeliest = found.top_logprobs[place]
        assert max(likeliest.values()) == pytest.approx(row.max().item(), abs=1e-4)
        assert likeliest[found.tokens[place]] == found.token_logprobs[place]
        assert len(likeliest) <= 2  # one, and the token that came
    for token_text, offset in zip(found.tokens, found.text_offset, strict=True):
        shown = offset < len(text) and not token_text.startswith(("bytes:", "<"))
        assert not shown or text[offset:].startswith(token_text)
    assert found.text_offset[0] == 0
    assert found.text_offset == sorted(found.text_offset)


@pytest.mark.parametrize("as_ids", [False, True])
@pytest.mark.parametrize("max_tokens", [0, 1, 5])
def test_the_prompts_tokens_come_before_the_answers(
    client: openai.OpenAI, running: Running, as_ids: bool, max_tokens: int
) -> None:
    """A text's start token was not sent, and has no entry; of token ids each has one."""
    engine = running.engines["noise"].engine
    prompts = [engine.prompt_ids(text) for text in TEXTS]
    options: dict[str, Any] = {"model": "noise", "max_tokens": max_tokens, "logprobs": 1, "echo": True, "seed": 3}
    more = {"ignore_eos": True, "return_token_ids": True}
    for _ in range(2):  # the second time the cache knows the prompts
        answer = client.completions.create(prompt=prompts if as_ids else TEXTS, n=2, extra_body=more, **options)
        assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
        assert answer.usage is not None
        assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (
            sum(map(len, prompts)),
            2 * 2 * max_tokens,
        )
        for ids, text, choice in zip(
            [ids for ids in prompts for _ in "12"], [text for text in TEXTS for _ in "12"], answer.choices, strict=True
        ):
            assert choice.finish_reason == "length"
            assert choice.text.startswith(text)
            assert len(choice.token_ids) == max_tokens
            assert choice.prompt_token_ids == ids
            read = [*ids, *choice.token_ids]
            assert_right(running, choice.logprobs, read, len(read) - (not as_ids), text)
            if choice.token_ids:
                assert choice.logprobs.text_offset[-max_tokens] == len(text)
        if max_tokens == 0:
            assert [choice.text for choice in answer.choices] == [TEXTS[0]] * 2 + [TEXTS[1]] * 2
    if max_tokens == 5:
        plain = client.completions.create(
            prompt=prompts if as_ids else TEXTS, n=2, extra_body=more, **options | {"echo": False}
        )
        echoed = [choice.text for choice in answer.choices]
        assert echoed == [text + c.text for text, c in zip([TEXTS[0]] * 2 + [TEXTS[1]] * 2, plain.choices, strict=True)]


@pytest.mark.parametrize("max_tokens", [0, 4])
def test_a_stream_tells_the_prompt_with_the_first_token(client: openai.OpenAI, max_tokens: int) -> None:
    options: dict[str, Any] = {
        "model": "noise", "prompt": TEXTS, "n": 2, "max_tokens": max_tokens, "logprobs": 2, "echo": True, "seed": 4,
        "extra_body": {"ignore_eos": True},
    }  # fmt: skip
    whole = client.completions.create(**options)
    chunks = list(client.completions.create(**options, stream=True, stream_options={"include_usage": True}))
    *chunks, last = chunks
    assert last.usage is not None
    assert last.usage.completion_tokens == 4 * max_tokens
    for choice in whole.choices:
        parts = [chunk.choices[0] for chunk in chunks if chunk.choices[0].index == choice.index]
        assert parts[0].text.startswith(TEXTS[choice.index // 2])
        assert "".join(part.text for part in parts) == choice.text
        assert parts[-1].finish_reason == choice.finish_reason == "length"
        assert choice.logprobs is not None
        for field in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            told = [item for part in parts if part.logprobs for item in getattr(part.logprobs, field)]
            whole_field = getattr(choice.logprobs, field)
            assert len(told) == len(whole_field)
            for one, other in zip(told, whole_field, strict=True):
                assert one == (pytest.approx(other, abs=1e-5) if isinstance(other, float | dict) else other)


def test_without_log_probabilities_it_is_the_text_alone(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="noise", prompt=TEXTS[1], max_tokens=0, echo=True)
    assert (answer.choices[0].text, answer.choices[0].logprobs) == (TEXTS[1], None)
    none_of_the_likeliest = client.completions.create(
        model="noise", prompt=TEXTS[1], max_tokens=0, echo=True, logprobs=0
    )
    logprobs = none_of_the_likeliest.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.top_logprobs is None
    assert logprobs.token_logprobs is not None
    assert logprobs.token_logprobs[0] is None
    assert all(value < 0 for value in logprobs.token_logprobs[1:])


@pytest.mark.parametrize("logprobs", [None, 0, 1])
def test_a_prompt_alone_may_fill_the_context(client: openai.OpenAI, running: Running, logprobs: int | None) -> None:
    """Prompt and max_tokens together do not exceed it. It was refused."""
    ids = [number % 200 for number in range(256)]
    options: dict[str, Any] = {"model": "noise", "max_tokens": 0, "logprobs": logprobs, "echo": True}
    (choice,) = client.completions.create(prompt=ids, **options).choices
    assert choice.finish_reason == "length"
    assert (choice.logprobs is None) == (logprobs is None)
    if logprobs:
        assert_right(running, choice.logprobs, ids, 256, choice.text)
    for tokens, more in (([*ids, 1], 0), (ids, 1)):
        with pytest.raises(openai.BadRequestError, match=r"maximum context length is 256 tokens") as raised:
            client.completions.create(prompt=tokens, **options | {"max_tokens": more})
        assert raised.value.code == "context_length_exceeded"


def test_control_tokens_of_a_prompt_have_entries_and_are_no_text(client: openai.OpenAI, running: Running) -> None:
    engine = running.engines["noise"].engine
    ids = [*engine.prompt_ids("the"), engine.tokenizer.im_end_id, *engine.tokenizer.encode("小鱼")]
    choice = client.completions.create(model="noise", prompt=ids, max_tokens=0, echo=True, logprobs=1).choices[0]
    assert choice.text == "the小鱼"
    assert_right(running, choice.logprobs, ids, len(ids), choice.text)
    assert choice.logprobs is not None
    assert choice.logprobs.tokens is not None
    assert choice.logprobs.tokens[0] == engine.tokenizer.decode([engine.tokenizer.start_id])


def test_a_token_behind_half_a_character_has_its_own_offset(client: openai.OpenAI, running: Running) -> None:
    """It had that of the half, which is a character of the text by then. Parts of a whole one share its offset."""
    tokenizer = running.engines["noise"].engine.tokenizer
    one_byte = {string: index for index, string in enumerate(tokenizer.byte_strings) if len(string) == 1}
    ids = [one_byte[bytes([byte])] for byte in b"a\xe5\xb0b\xe5\xb0\x8fc\xe5"] + [tokenizer.im_end_id, one_byte[b"d"]]
    choice = client.completions.create(model="noise", prompt=ids, max_tokens=0, echo=True, logprobs=0).choices[0]
    assert choice.text == "a\ufffdb小c\ufffdd"
    assert choice.logprobs is not None
    assert choice.logprobs.text_offset == [0, 1, 1, 2, 3, 3, 3, 4, 5, 6, 6]


def test_no_tokens_without_echo(running: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError, match="0 is only allowed with echo") as raised:
        client.completions.create(model="noise", prompt="x", max_tokens=0)
    assert raised.value.param == "max_tokens"
    chat = {"model": "noise", "messages": [{"role": "user", "content": "x"}], "echo": True}
    answer = httpx.post(f"{running.url}/v1/chat/completions", json=chat)
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "echo")


@pytest.mark.parametrize("as_ids", [False, True])
def test_a_harness_scores_a_continuation_by_its_place(running: Running, as_ids: bool) -> None:
    """lm-evaluation-harness 0.4.13, local-completions: the sum of token_logprobs[len(context):-1] of such requests.

    With tokenized_requests=False it sends texts, whose tokens it counts without a start token.
    """
    tokenizer = running.engines["noise"].engine.tokenizer
    start = [tokenizer.start_id] if as_ids else []
    context, endings = "the little minnow", [" swims", " in the pond。"]
    encoded = [[*start, *tokenizer.encode(context + ending)] for ending in endings]
    length = len(start) + len(tokenizer.encode(context))
    body = {"model": "noise", "prompt": encoded if as_ids else [context + ending for ending in endings]}
    body |= {"temperature": 0, "max_tokens": 1, "logprobs": 1, "seed": 1234, "echo": True}
    choices = httpx.post(f"{running.url}/v1/completions", json=body).json()["choices"]
    for choice, ids in zip(choices, encoded, strict=True):
        logprobs = logprobs_of(running, [tokenizer.start_id, *ids[len(start) :]])
        continuation = ids[length:]
        places = range(len(ids) - len(start) - len(continuation), len(ids) - len(start))
        expected = [logprobs[place] for place in places]
        scored = choice["logprobs"]["token_logprobs"][length:-1]
        assert sum(scored) == pytest.approx(
            sum(row[token].item() for row, token in zip(expected, continuation, strict=True)), abs=1e-4
        )
        greedy = [
            value == max(top.values())
            for value, top in zip(scored, choice["logprobs"]["top_logprobs"][length:-1], strict=True)
        ]
        assert greedy == [row.argmax().item() == token for row, token in zip(expected, continuation, strict=True)]


def test_as_many_stop_strings_as_a_harness_sends(client: openai.OpenAI) -> None:
    """Its tasks have up to six, and it adds the end-of-text token."""
    stop = ["\n\n", "Q:", "</s>", "<|im_end|>", "<|eot_id|>", "swims", "<|endoftext|>"]
    ask: list[Any] = [{"role": "user", "content": "你好"}]
    answer = client.chat.completions.create(model="parrot", messages=ask, temperature=0, stop=stop)
    assert answer.choices[0].message.content == "小鱼 "
    assert client.completions.create(model="noise", prompt="x", stop=stop, max_tokens=3).choices[0].finish_reason
