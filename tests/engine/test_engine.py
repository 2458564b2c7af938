"""The engine against transformers and against forward passes without a cache."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from engine_helpers import full_logits, random_prompts, tiny_model, tiny_tokenizer
from transformers import AutoModelForCausalLM

from minnow.config import UserError
from minnow.engine import Completions, Delta, Engine, SamplingParams
from minnow.engine.grammar import regex_grammar
from minnow.model.attention import CausalAttention
from minnow.model.experts_config import ExpertsConfig
from minnow.model.pretrained import save_pretrained


def make_engine(seed: int = 0, engine: dict[str, Any] | None = None, **changes: Any) -> Engine:
    return Engine(tiny_model(seed, **changes), tiny_tokenizer(), **(engine or {}))


def ids_of(outputs: list[Completions]) -> list[list[list[int]]]:
    return [[completion.ids for completion in output.completions] for output in outputs]


SIGMOID_EXPERTS = ExpertsConfig(
    num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, scoring="sigmoid", n_shared_experts=1
)
GREEDY = SamplingParams(temperature=0.0, max_tokens=24)


SHAPES = [
    (0, {}),
    (1, {"num_key_value_heads": 4, "head_dim": 16, "tie_word_embeddings": False}),
    (2, {"qk_norm": False, "num_key_value_heads": 1}),
]


def assert_greedy_equals_transformers(folder: Path, seed: int, changes: dict[str, Any], count: int) -> None:
    engine = make_engine(seed, {"max_rows": 24, "max_step_tokens": 300}, **changes)
    save_pretrained(engine.model, folder / "model", tiny_tokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(folder / "model")
    prompts = random_prompts(count, seed)
    outputs = engine.generate(prompts, GREEDY)
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)
        assert output.prompt_ids == prompt
        assert output.completions[0].ids == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize(("seed", "changes"), SHAPES)
def test_greedy_equals_transformers_on_ragged_batches(tmp_path: Path, seed: int, changes: dict[str, Any]) -> None:
    assert_greedy_equals_transformers(tmp_path, seed, changes, 40)


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "changes"), SHAPES)
def test_greedy_equals_transformers_on_hundreds_of_prompts(tmp_path: Path, seed: int, changes: dict[str, Any]) -> None:
    assert_greedy_equals_transformers(tmp_path, seed + 100, changes, 200)


def test_end_tokens_end_as_in_transformers(tmp_path: Path) -> None:
    engine = make_engine(3)
    save_pretrained(engine.model, tmp_path / "model", tiny_tokenizer())
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    # Lift both end tokens so that answers end at different places.
    bias = {tiny_tokenizer().end_of_text_id: 2.0, tiny_tokenizer().im_end_id: 2.0}
    prompts = random_prompts(30, 5)
    outputs = engine.generate(prompts, replace(GREEDY, logit_bias=bias))
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            expected = theirs.generate(
                torch.tensor([prompt]),
                do_sample=False,
                max_new_tokens=24,
                sequence_bias={(token,): value for token, value in bias.items()},
            )
        assert output.completions[0].ids == expected[0, len(prompt) :].tolist()
    reasons = [output.completions[0].finish_reason for output in outputs]
    assert set(reasons) == {"stop", "length"}


def test_answers_do_not_depend_on_the_batch() -> None:
    prompts = random_prompts(12, 8)
    wishes = [
        SamplingParams(seed=i, n=1 + i % 3, max_tokens=5 + i, top_p=0.9 if i % 2 else 1.0, temperature=1 + i % 2)
        for i in range(len(prompts))
    ]
    together = ids_of(make_engine(9).generate(prompts, wishes))
    alone = [ids_of(make_engine(9).generate([p], w))[0] for p, w in zip(prompts, wishes, strict=True)]
    assert together == alone
    for settings in ({"max_rows": 1}, {"max_rows": 5, "max_step_tokens": 1}, {"cache_bytes": 100_000}):
        assert ids_of(make_engine(9, settings).generate(prompts, wishes)) == together
    order = [7, 3, 11, 0]
    shuffled = make_engine(9).generate([prompts[i] for i in order], [wishes[i] for i in order])
    assert ids_of(shuffled) == [together[i] for i in order]


def test_samples_differ_and_an_unseeded_request_can_be_repeated() -> None:
    engine = make_engine(10)
    params = SamplingParams(n=4, max_tokens=12)
    first, second = engine.generate([[5, 6, 7]] * 2, params)
    answers = [tuple(c.ids) for c in (*first.completions, *second.completions)]
    assert len(set(answers)) == 8
    again = engine.generate([[5, 6, 7]], replace(params, seed=second.seed))
    assert ids_of(again) == ids_of([second])


def test_samples_share_one_prefill() -> None:
    engine = make_engine(11)
    read = []
    forward = engine.model.forward
    engine.model.forward = lambda tokens, *rest, **more: read.append(tokens.numel()) or forward(tokens, *rest, **more)
    engine.generate([[5] * 20, [6] * 10], SamplingParams(n=4, max_tokens=3, ignore_eos=True))
    assert read == [30, 8, 8]


def test_requests_that_begin_alike_are_not_read_twice() -> None:
    """As the answers of one group in reinforcement come: each a request with a seed of its own."""
    engine = make_engine(11)
    read = []
    forward = engine.model.forward
    engine.model.forward = lambda tokens, *rest, **more: read.append(tokens.numel()) or forward(tokens, *rest, **more)
    prompts = [[5] * 40] * 4 + [[6] * 40]
    params = [SamplingParams(seed=seed, max_tokens=4, ignore_eos=True) for seed in range(5)]
    together = engine.generate(prompts, params)
    # 40 tokens are two blocks of 16 and 8 more. The second step: two rows on, and three times those 8.
    assert read[:3] == [80, 2 + 3 * 8, 5]
    assert [output.completions[0].ids for output in together] == [
        make_engine(11).generate([prompt], param)[0].completions[0].ids
        for prompt, param in zip(prompts, params, strict=True)
    ]


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 0.7, "top_p": 0.8}, {"temperature": 0.0}, {"repetition_penalty": 1.2, "top_k": 9}]
)
def test_logprobs_equal_a_full_forward(options: dict[str, Any]) -> None:
    engine = make_engine(12)
    params = SamplingParams(seed=1, max_tokens=20, logprobs=True, n=2, **options)
    for output in engine.generate(random_prompts(6, 13), params):
        for completion in output.completions:
            logits = full_logits(engine.model, output.prompt_ids + completion.ids)[len(output.prompt_ids) - 1 : -1]
            chosen = torch.tensor(completion.ids)[:, None]
            raw = logits.log_softmax(-1).gather(1, chosen)[:, 0]
            assert completion.raw_logprobs == pytest.approx(raw.tolist(), abs=1e-5)
            assert completion.logprobs is not None
            if not options:
                assert completion.logprobs == pytest.approx(raw.tolist(), abs=1e-5)
            elif options.get("temperature") == 0:
                assert completion.logprobs == [0.0] * len(completion.ids)
            elif "top_p" in options:
                scaled = (logits / 0.7).log_softmax(-1)
                for row, token, logprob in zip(scaled, completion.ids, completion.logprobs, strict=True):
                    order = row.argsort(descending=True)
                    mass_before = row[order].exp().cumsum(0) - row[order].exp()
                    kept = order[mass_before < 0.8]
                    assert token in kept
                    assert logprob == pytest.approx((row[token] - row[kept].logsumexp(0)).item(), abs=1e-5)


def test_first_tokens_follow_the_models_distribution() -> None:
    engine = make_engine(14)
    draws, prompt = 4000, [40, 41, 42]
    outputs = engine.generate([prompt], SamplingParams(n=draws, max_tokens=1, seed=3))
    counts = torch.bincount(torch.tensor([c.ids[0] for c in outputs[0].completions]), minlength=320)
    expected = full_logits(engine.model, prompt)[-1].softmax(-1) * draws
    common = expected > 10
    chi_square = ((counts - expected)[common] ** 2 / expected[common]).sum().item()
    freedom = int(common.sum())
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_streaming_gives_the_same_as_generate() -> None:
    engine = make_engine(15)
    params = SamplingParams(n=3, seed=4, max_tokens=30, logprobs=True, stop=["e"], top_k=40)
    (output,) = engine.generate(["小鱼 the pond"], params)
    deltas = list(engine.stream("小鱼 the pond", params))
    for index, completion in enumerate(output.completions):
        mine = [delta for delta in deltas if delta.index == index]
        assert [delta.id for delta in mine] == completion.ids
        assert "".join(delta.text for delta in mine) == completion.text
        assert [delta.logprob for delta in mine] == completion.logprobs
        assert [delta.finish_reason for delta in mine] == [None] * (len(mine) - 1) + [completion.finish_reason]


def test_text_is_the_decoded_ids_in_whole_characters() -> None:
    engine, tokenizer = make_engine(16), tiny_tokenizer()
    params = SamplingParams(seed=5, max_tokens=40, ignore_eos=True, skip_special_tokens=False)
    for output in engine.generate(random_prompts(20, 17), params):
        completion = output.completions[0]
        decoded = tokenizer.decode(completion.ids)
        # Random bytes may end within a character, which the text leaves out and decode shows as U+FFFD.
        assert decoded in (completion.text, completion.text + "\ufffd")


def scripted(engine: Engine, script: list[int]) -> None:
    """Make the model say `script` after a one-token prompt."""
    vocab_size = engine.model.config.vocab_size
    hidden = engine.model.config.hidden_size

    def forward(
        tokens: torch.Tensor, positions: torch.Tensor, attention: object, images: object = None
    ) -> torch.Tensor:
        said = torch.zeros(*tokens.shape, hidden)
        said[..., 0] = torch.tensor([[script[p % len(script)] for p in row] for row in positions.tolist()])
        return said

    engine.model.forward = forward
    engine.model.logits = lambda x: 50.0 * torch.nn.functional.one_hot(x[..., 0].long(), vocab_size).float()


def test_stop_strings_across_token_borders() -> None:
    engine, tokenizer = make_engine(), tiny_tokenizer()
    script = [token for text in ("the mi", "nn", "ow swi", "ms. 小鱼") for token in tokenizer.encode(text)]
    scripted(engine, script)
    for stop, expected in [
        (["now s"], "the min"),
        (["小"], "the minnow swims. "),
        (["swim!", "ow"], "the minn"),
        ("the", ""),
        (["nowhere"], "the minnow swims. 小鱼"),
    ]:
        params = SamplingParams(temperature=0.0, stop=stop, max_tokens=len(script))
        (completion,) = engine.generate([[40]], params)[0].completions
        assert completion.text == expected
        assert completion.finish_reason == ("length" if stop == ["nowhere"] else "stop")
        assert completion.ids == script[: len(completion.ids)]
        pieces = [delta.text for delta in engine.stream([40], params)]
        assert "".join(pieces) == expected
        assert not any("\ufffd" in piece for piece in pieces)


def test_control_tokens_in_the_text() -> None:
    engine, tokenizer = make_engine(), tiny_tokenizer()
    special = tokenizer.special_ids
    script = [
        special["<think>"],
        *tokenizer.encode("so"),
        special["</think>"],
        special["<|im_start|>"],
        tokenizer.im_end_id,
    ]
    scripted(engine, script)
    params = SamplingParams(temperature=0.0)
    (completion,) = engine.generate([[40]], params)[0].completions
    assert (completion.text, completion.finish_reason) == ("<think>so</think>", "stop")
    assert completion.ids == script  # the end token is part of what was sampled
    (completion,) = engine.generate([[40]], replace(params, skip_special_tokens=False))[0].completions
    assert completion.text == "<think>so</think><|im_start|>"


def test_min_tokens_ignore_eos_and_stop_tokens() -> None:
    engine, tokenizer = make_engine(), tiny_tokenizer()
    a, b = tokenizer.encode("a")[0], tokenizer.encode("b")[0]
    scripted(engine, [a, b, tokenizer.end_of_text_id, a])

    def finished(**options: Any) -> tuple[int, str]:
        params = SamplingParams(**{"temperature": 0.0, "max_tokens": 9, **options})
        (completion,) = engine.generate([[40]], params)[0].completions
        return len(completion.ids), completion.finish_reason

    assert finished() == (3, "stop")
    assert finished(ignore_eos=True) == (9, "length")
    assert finished(ignore_eos=True, stop_token_ids=[b]) == (2, "stop")
    assert finished(ignore_eos=True, stop_token_ids=[b], min_tokens=3) == (6, "stop")
    # An end at the last place there is room for is an end all the same.
    assert finished(max_tokens=3) == (3, "stop")
    assert finished(stop=["b"], max_tokens=2) == (2, "stop")
    assert finished(min_tokens=3) == (7, "stop")  # barred at its first place, it comes at the next
    assert finished(min_tokens=9, ignore_eos=True) == (9, "length")  # no token ends this answer: none is barred
    assert finished(stop=["a"], min_tokens=2) == (3, "stop")
    assert finished(stop=["ab"], min_tokens=2) == (2, "stop")  # it begins before and ends in time
    with pytest.raises(UserError, match="min_tokens bars the tokens that end an answer, which are all there are"):
        finished(min_tokens=1, stop_token_ids=range(engine.model.config.vocab_size))


def test_the_context_ends_the_answer() -> None:
    engine = make_engine(18, max_position_embeddings=32)
    for length in (1, 30, 31):
        for max_tokens in (None, 100):
            params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=True)
            (completion,) = engine.generate([[7] * length], params)[0].completions
            assert (len(completion.ids), completion.finish_reason) == (32 - length, "length")
    with pytest.raises(UserError, match="32 tokens.*context is 32"):
        engine.stream([7] * 32)


def test_bad_prompts_are_refused() -> None:
    engine = make_engine()
    with pytest.raises(UserError, match="no tokens"):
        engine.generate([[]])
    with pytest.raises(UserError, match="token 320"):
        engine.generate([[320]])
    with pytest.raises(UserError, match="logit_bias holds token -1"):  # it would be the last one's
        engine.generate([[5]], SamplingParams(logit_bias={-1: 1.0}))
    with pytest.raises(UserError, match="2 prompts but 1"):
        engine.generate([[5], [6]], [SamplingParams()])
    assert engine.generate([], SamplingParams()) == []


def test_a_text_prompt_starts_a_document() -> None:
    engine, tokenizer = make_engine(19), tiny_tokenizer()
    (output,) = engine.generate(["the pond"], GREEDY)
    assert output.prompt_ids == [tokenizer.end_of_text_id, *tokenizer.encode("the pond")]
    assert ids_of(engine.generate([""], GREEDY)) == ids_of(engine.generate([[tokenizer.end_of_text_id]], GREEDY))


def test_weights_updated_rereads_answers_under_way() -> None:
    engine, other = make_engine(20), tiny_model(21)
    prompt = [5, 6, 7]
    stream = engine.stream(prompt, replace(GREEDY, n=2, ignore_eos=True))
    before = [delta.id for delta in itertools.islice(stream, 10) if delta.index == 0]
    engine.model.load_state_dict(other.state_dict())
    engine.weights_updated()
    after = [delta.id for delta in stream if delta.index == 0]
    for i, token in enumerate(after):
        logits = full_logits(other, prompt + before + after[:i])[-1]
        assert token == logits.argmax()
    assert len(before) + len(after) == 24


def test_answers_under_way_and_grammars_end_where_the_new_weights_do() -> None:
    """A server's reload brings other end tokens with the weights; answers went on to the old ones."""
    engine = Engine(tiny_model(), tiny_tokenizer())
    end = tiny_tokenizer().special_ids["<|im_start|>"]
    always = SamplingParams(max_tokens=20, temperature=0, logit_bias={end: 1e4})
    bound = SamplingParams(max_tokens=20, temperature=0, logit_bias={end: 1e4}, grammar=regex_grammar("[ab]*"))
    assert end not in engine.generate([[5]], bound)[0].completions[0].ids
    streams = [engine.stream([5], params) for params in (always, replace(always, ignore_eos=True))]
    for stream in streams:
        assert next(stream).finish_reason is None
    engine.model.generation_config = {"eos_token_id": end}
    engine.weights_updated()
    assert [[delta.finish_reason for delta in stream] for stream in streams] == [
        [None, "stop"],
        [None] * 18 + ["length"],
    ]
    assert engine.generate([[5]], bound)[0].completions[0].ids == [end]


def test_weights_change_between_calls() -> None:
    engine, other = make_engine(22), tiny_model(23)
    engine.generate([[5, 6]], GREEDY)
    engine.model.load_state_dict(other.state_dict())
    engine.weights_updated()
    assert ids_of(engine.generate([[5, 6]], GREEDY)) == ids_of(
        Engine(other, tiny_tokenizer()).generate([[5, 6]], GREEDY)
    )


def test_streams_interleave_and_can_be_dropped() -> None:
    engine = make_engine(24)
    params = SamplingParams(seed=1, max_tokens=20, ignore_eos=True)
    alone = ids_of(engine.generate([[5], [6, 7]], params))
    one, two = engine.stream([5], params), engine.stream([6, 7], params)
    engine.stream([8], params)  # never started
    dropped = engine.stream([9], params)
    next(dropped)
    dropped.close()
    pairs = list(zip(one, two, strict=True))
    assert [[[a.id for a, _ in pairs]], [[b.id for _, b in pairs]]] == alone


def test_generation_leaves_gradients_switched_on() -> None:
    engine = make_engine(25)
    for _ in engine.stream([5], replace(GREEDY, max_tokens=2)):
        assert torch.is_grad_enabled()
    tokens = torch.tensor([[5, 6, 7]])
    hidden = engine.model(tokens, torch.arange(3)[None], CausalAttention())
    engine.model.logits(hidden).sum().backward()
    assert all(parameter.grad is not None for parameter in engine.model.parameters())


def collect(engine: Engine) -> dict[int, list[Delta]]:
    deltas: dict[int, list[Delta]] = {}
    while engine.has_work:
        for request_id, delta in engine.step():
            deltas.setdefault(request_id, []).append(delta)
    return deltas


def test_add_and_step_give_what_generate_gives() -> None:
    engine = make_engine(26, {"max_rows": 3})
    prompts = random_prompts(7, 27)
    wishes = [SamplingParams(seed=i, n=1 + i % 2, max_tokens=3 + i, ignore_eos=True) for i in range(7)]
    expected = engine.generate(prompts, wishes)
    assert not engine.has_work
    ids = [engine.add(prompt, params) for prompt, params in zip(prompts[:4], wishes[:4], strict=True)]
    early = engine.step() + engine.step()
    ids += [engine.add(prompt, params) for prompt, params in zip(prompts[4:], wishes[4:], strict=True)]
    deltas = collect(engine)
    for request_id, delta in reversed(early):
        deltas.setdefault(request_id, []).insert(0, delta)
    assert not engine.has_work
    for request_id, prompt, output in zip(ids, prompts, expected, strict=True):
        mine = deltas[request_id]
        for index, completion in enumerate(output.completions):
            assert [delta.id for delta in mine if delta.index == index] == completion.ids
        assert [delta.usage is not None for delta in mine] == [False] * (len(mine) - 1) + [True]
        usage = mine[-1].usage
        assert usage is not None
        assert (usage.prompt_tokens, usage.completion_tokens) == (len(prompt), len(mine))


def test_abort_frees_and_leaves_the_others_alone() -> None:
    engine = make_engine(28)
    params = SamplingParams(seed=1, n=2, max_tokens=20, ignore_eos=True)
    expected = ids_of(engine.generate([[5], [6, 7], [8]], params))
    ids = [engine.add(prompt, params) for prompt in ([5], [6, 7], [8])]
    seen = [*engine.step(), *engine.step(), *engine.step()]
    engine.abort(ids[1])
    engine.abort(ids[1])  # again: nothing
    rest = collect(engine)
    assert ids[1] not in rest
    for request_id, answer in ((ids[0], expected[0]), (ids[2], expected[2])):
        got = [delta for id, delta in seen if id == request_id] + rest.get(request_id, [])
        assert [[d.id for d in got if d.index == index] for index in range(2)] == answer
    engine.abort(ids[0])  # finished long ago
    assert not engine.has_work
    assert ids_of(engine.generate([[5]], params)) == expected[:1]


def test_streams_and_steps_share_an_engine() -> None:
    engine = make_engine(29)
    params = SamplingParams(seed=2, max_tokens=12, ignore_eos=True)
    expected = ids_of(engine.generate([[5], [6, 7]], params))
    request_id = engine.add([5], params)
    streamed = [delta.id for delta in engine.stream([6, 7], params)]
    assert [streamed] == expected[1]
    assert engine.has_work  # the deltas that came meanwhile wait for their owner
    assert [[delta.id for delta in collect(engine)[request_id]]] == expected[0]
    request_id = engine.add([5], params)
    list(engine.stream([6, 7], params))
    engine.abort(request_id)  # those of a request that is aborted have none
    assert not engine.has_work
    assert engine.step() == []


def test_add_refuses_before_anything_is_added() -> None:
    engine = make_engine(max_position_embeddings=16)
    for prompt in ([], [320], [5] * 16):
        with pytest.raises(UserError):
            engine.add(prompt)
    assert not engine.has_work
    assert engine.step() == []


def test_top_logprobs() -> None:
    engine = make_engine(30)
    params = SamplingParams(seed=3, max_tokens=5, top_logprobs=3, temperature=0.5, ignore_eos=True)
    (output,) = engine.generate([[5, 6]], params)
    completion = output.completions[0]
    assert completion.logprobs is None
    assert completion.top_logprobs is not None
    logits = full_logits(engine.model, [5, 6, *completion.ids])[1:-1]
    values, tokens = logits.log_softmax(-1).topk(3)
    assert [[token for token, _ in place] for place in completion.top_logprobs] == tokens.tolist()
    for place, expected in zip(completion.top_logprobs, values.tolist(), strict=True):
        assert [value for _, value in place] == pytest.approx(expected, abs=1e-5)
    assert [delta.top_logprobs for delta in engine.stream([5, 6], params)] == completion.top_logprobs


def test_top_logprobs_are_raw_and_each_row_gets_its_own_number() -> None:
    engine = make_engine(31)
    pushed = {"logit_bias": {9: 6.0}, "frequency_penalty": 1.5, "repetition_penalty": 2.0, "ignore_eos": True}
    wishes = [
        SamplingParams(seed=i, max_tokens=5, top_logprobs=count, logprobs=True, **pushed)
        for i, count in enumerate((1, 3, 0))
    ]
    for output, count in zip(engine.generate([[5, 6]] * 3, wishes), (1, 3, 0), strict=True):
        (completion,) = output.completions
        raw = full_logits(engine.model, [5, 6, *completion.ids])[1:-1].log_softmax(-1)
        chosen = raw.gather(1, torch.tensor(completion.ids)[:, None])[:, 0]
        assert completion.raw_logprobs == pytest.approx(chosen.tolist(), abs=1e-5)
        if not count:
            assert completion.top_logprobs is None
            continue
        assert completion.top_logprobs is not None
        shown = [[token for token, _ in place] for place in completion.top_logprobs]
        assert shown == raw.topk(count).indices.tolist()
