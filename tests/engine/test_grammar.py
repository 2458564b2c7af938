"""Constrained answers: whatever a random model wants to say, the grammar holds."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import pytest
import torch
from engine_helpers import LATE, WIDE, NoTorch, tiny_model, tiny_tokenizer

from minnow.config import UserError
from minnow.engine import Completion, Engine, SamplingParams
from minnow.engine.grammar import json_grammar, regex_grammar, tool_call_grammar
from minnow.tokenizer.parse import parse_assistant_ids
from minnow.tokenizer.train import train_tokenizer

SCHEMA = {
    "type": "object",
    "properties": {"name": {"enum": ["carp", "小鱼"]}, "size": {"type": "integer", "minimum": 1, "maximum": 30}},
    "required": ["name", "size"],
    "additionalProperties": False,
}


def answer(grammar: str, **options: Any) -> tuple[Completion, ...]:
    # A vocabulary padded beyond the tokenizer's, as models have it.
    model = tiny_model(1, vocab_size=tiny_tokenizer().vocab_size + 13)
    params = SamplingParams(**{"grammar": grammar, "seed": 1, "n": 6, "max_tokens": 100, **options})
    return Engine(model, tiny_tokenizer()).generate(["the pond"], params)[0].completions


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"temperature": 3.0}, {"top_k": 2, "top_p": 0.5}])
def test_json_schema(options: dict[str, Any]) -> None:
    for completion in answer(json_grammar(SCHEMA), **options):
        assert completion.finish_reason == "stop"
        value = json.loads(completion.text)
        assert set(value) == {"name", "size"}
        assert value["name"] in ("carp", "小鱼")
        assert value["size"] in range(1, 31)
        assert completion.text == json.dumps(value, ensure_ascii=False)  # written as the template writes


def test_samples_go_their_own_ways() -> None:
    assert len({completion.text for completion in answer(json_grammar(SCHEMA), n=12)}) > 4


def test_any_json_object_is_one_as_far_as_it_goes() -> None:
    for completion in answer(json_grammar()):
        assert completion.text.startswith("{")
        if completion.finish_reason == "stop":
            assert isinstance(json.loads(completion.text), dict)


def test_regex() -> None:
    pattern = "[0-9]{4}-(0[1-9]|1[0-2])/(鱼|fish)"
    for completion in answer(regex_grammar(pattern)):
        assert completion.finish_reason == "stop"
        assert re.fullmatch(pattern, completion.text)


@pytest.mark.parametrize("pattern", ["https?://[a-z]{3}", r"https?:\/\/[a-z]{3}", r"\\/[/\/]\\{2}"])
def test_slashes_of_a_regex_may_be_escaped(pattern: str) -> None:
    for completion in answer(regex_grammar(pattern)):
        assert re.fullmatch(pattern, completion.text)


def test_tool_calls_are_real_control_tokens_around_valid_arguments() -> None:
    tokenizer = tiny_tokenizer()
    nothing = {"type": "object", "properties": {}, "additionalProperties": False}
    tools = [{"name": '称 "it"', "parameters": SCHEMA}, {"name": "look", "parameters": nothing}]
    soon = {tokenizer.im_end_id: 6.0}
    for completion in answer(tool_call_grammar(tokenizer, tools), logit_bias=soon):
        assert completion.finish_reason == "stop"
        message = parse_assistant_ids(tokenizer, completion.ids)
        assert message.tool_calls
        assert "\\u" not in completion.text  # written as the template writes
        assert not message.content
        for call in message.tool_calls:
            assert call.name in ('称 "it"', "look")
            assert set(call.arguments) == ({"name", "size"} if call.name != "look" else set())


def test_logprobs_are_those_of_what_was_allowed() -> None:
    for completion in answer(regex_grammar("a|b"), logprobs=True, n=3):
        assert completion.logprobs is not None
        assert completion.raw_logprobs is not None
        assert 0 >= completion.logprobs[0] > completion.raw_logprobs[0]


def test_neighbours_stay_free() -> None:
    engine = Engine(tiny_model(2), tiny_tokenizer())
    free = SamplingParams(seed=3, max_tokens=20)
    alone = engine.generate([[5, 6]], free)[0].completions[0].ids
    together = engine.generate([[5, 6], [7]], [free, SamplingParams(grammar=regex_grammar("[ab]{5}"), seed=1)])
    assert together[0].completions[0].ids == alone
    assert re.fullmatch("[ab]{5}", together[1].completions[0].text)


@pytest.mark.parametrize("grammar", ["start: [", json_grammar({"type": "nonsense"}), regex_grammar("("), WIDE])
def test_a_bad_grammar_is_refused_before_anything_is_added(grammar: str) -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    with pytest.raises(UserError, match="cannot be followed") as raised:
        engine.add("x", SamplingParams(grammar=grammar))
    assert len(str(raised.value)) < 400  # the reason, and not the grammar
    assert not engine.has_work


def test_a_grammar_that_fails_on_the_way_ends_only_its_own_request() -> None:
    engine = Engine(tiny_model(2), tiny_tokenizer())
    free = SamplingParams(seed=3, max_tokens=20, ignore_eos=True)
    alone = engine.generate([[5, 6]], free)[0].completions[0].ids
    late, letters = SamplingParams(grammar=LATE, seed=1, n=3), SamplingParams(grammar=regex_grammar("[ab]{5}"))
    requests = [engine.add([5, 6], params) for params in (free, late, letters)]
    said: dict[int, list[Any]] = {request: [] for request in requests}
    while engine.has_work:
        for request, outcome in engine.step():
            said[request].append(outcome)
    free_said, (*deltas, last), letters_said = said.values()
    assert [delta.id for delta in free_said] == alone
    assert re.fullmatch("[ab]{5}", "".join(delta.text for delta in letters_said))
    assert re.fullmatch("[ab]{4}", "".join(delta.text for delta in deltas if delta.index == 0))
    assert isinstance(last, UserError)
    assert not any(isinstance(delta, UserError) for delta in deltas)
    assert not engine._parts().scheduler.running
    assert not engine._parts().scheduler.waiting


def test_generate_and_stream_raise_what_fails_on_the_way() -> None:
    engine = Engine(tiny_model(), tiny_tokenizer())
    params = SamplingParams(grammar=LATE, seed=1)
    with pytest.raises(UserError, match="cannot be followed"):
        engine.generate([[5], [6]], [params, SamplingParams(max_tokens=3)])
    with pytest.raises(UserError, match="cannot be followed"):
        list(engine.stream([5], params))
    assert not engine.has_work


def test_what_cannot_go_with_a_grammar() -> None:
    with pytest.raises(UserError, match="min_tokens"):
        SamplingParams(grammar="start: TEXT", min_tokens=2)
    tokenizer = train_tokenizer(["the little minnow"] * 3, 320)
    tokenizer.special_ids.pop("<tool_call>")
    with pytest.raises(UserError, match="cannot chat: its special tokens lack <tool_call>"):
        tool_call_grammar(tokenizer, [{"name": "look"}])


def test_the_extra_is_named_where_llguidance_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(UserError, match=r"minnow\[serve\]"):
        Engine(tiny_model(), tiny_tokenizer()).add("x", SamplingParams(grammar=regex_grammar("a")))


def test_text_cannot_spell_a_control_token_into_being() -> None:
    """TEXT allows every character, but no control token."""
    special = set(tiny_tokenizer().special_ids.values()) - {tiny_tokenizer().im_end_id, tiny_tokenizer().end_of_text_id}
    bias = dict.fromkeys(special, 50.0)
    for completion in answer(regex_grammar("(.|\\n){20}"), logit_bias=bias):
        assert not special & set(completion.ids)
    assert torch.is_grad_enabled()


def test_a_grammar_is_compiled_without_torch() -> None:
    """The server does it in threads that live on, whose OpenMP threads would slow every later step down."""
    engine = Engine(tiny_model(), tiny_tokenizer())
    with NoTorch():
        assert engine.constraint(SamplingParams(grammar=regex_grammar("[ab]{3}"))) is not None
