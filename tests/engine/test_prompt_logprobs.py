"""How likely a prompt is: on every way through the cache as one forward pass of the training module has it."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch
from engine_helpers import full_logits, random_prompts, tiny_model, tiny_tokenizer
from test_varlen_runner import attend

from minnow.config import UserError
from minnow.engine import Delta, Engine, PromptLogprobs, SamplingParams
from minnow.engine.blocks import BlockManager
from minnow.engine.cache import PagedCache, Window
from minnow.engine.parts import Parts
from minnow.engine.runner import Runner
from minnow.engine.scheduler import Scheduler
from minnow.engine.varlen_runner import VarlenRunner
from minnow.model.attention import causal
from minnow.model.transformer import CausalLM

ASKED = SamplingParams(temperature=0.0, max_tokens=4, prompt_logprobs=3, ignore_eos=True)


def make_engine(
    seed: int = 0, *, blocks: int = 64, max_step_tokens: int = 10_000, varlen: bool = False, frozen: bool = False
) -> Engine:
    """Blocks of 8 tokens, exactly so many of them."""
    model = tiny_model(seed)
    engine = Engine(model, tiny_tokenizer(), frozen=frozen)
    where = (torch.float32, torch.device("cpu"))
    cache = PagedCache(model.config, blocks, 8, *where)
    runner: Runner | VarlenRunner
    if varlen:
        runner = VarlenRunner(cache, model.config, 16, causal(attend), None)
    else:
        runner = Runner(cache, Window(model.config, 16, *where))
    engine._made = Parts(Scheduler(BlockManager(blocks, 8), 16, max_step_tokens), runner)
    return engine


def assert_right(model: CausalLM, prompt: list[int], found: PromptLogprobs | None, top: int = 3) -> None:
    assert found is not None
    logprobs = full_logits(model, prompt).log_softmax(-1)[:-1]
    expected = logprobs.gather(1, torch.tensor(prompt[1:], dtype=torch.int64)[:, None])[:, 0].tolist()
    assert found.logprobs[0] is None
    assert found.logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert found.top_logprobs is not None
    assert found.top_logprobs[0] is None
    assert len(found.top_logprobs) == len(prompt)
    for likeliest, expected_V in zip(found.top_logprobs[1:], logprobs, strict=True):
        assert likeliest is not None
        assert [token for token, _ in likeliest] == expected_V.topk(top).indices.tolist()
        assert [logprob for _, logprob in likeliest] == pytest.approx(expected_V.topk(top).values.tolist(), abs=1e-5)


def run(engine: Engine, prompt: list[int], params: SamplingParams) -> list[Delta]:
    engine.add(prompt, params)
    deltas = []
    while engine.has_work:
        deltas += [delta for _, delta in engine.step() if isinstance(delta, Delta)]
    return deltas


def cached_tokens(deltas: list[Delta]) -> int:
    assert deltas[-1].usage is not None
    return deltas[-1].usage.cached_tokens


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize(
    "settings",
    [{}, {"max_step_tokens": 7}, {"blocks": 17, "max_step_tokens": 23}, {"frozen": True}],
)
def test_they_are_the_training_modules(settings: dict[str, Any], varlen: bool) -> None:
    """Of prompts that begin alike, in pieces, beside rows that decode, read again after a preemption, with siblings."""
    engine = make_engine(1, varlen=varlen, **settings)
    prompts = random_prompts(6, 1, longest=60)
    prompts += [[*prompts[0][:1], *range(10, 40), 50 + i] for i in range(3)] + [[7]]
    params = SamplingParams(seed=1, n=2, max_tokens=12, prompt_logprobs=3, ignore_eos=True)
    plain = SamplingParams(seed=1, n=2, max_tokens=12, ignore_eos=True)
    outputs = engine.generate(prompts, params)
    for prompt, output in zip(prompts, outputs, strict=True):
        assert_right(engine.model, prompt, output.prompt_logprobs)
    assert engine._parts().scheduler.preemptions > 0 or "blocks" not in settings
    answers = [[c.ids for c in output.completions] for output in make_engine(1).generate(prompts, plain)]
    assert [[c.ids for c in output.completions] for output in outputs] == answers


@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 50, "blocks": 32}])
def test_such_a_prompt_may_fill_the_context(settings: dict[str, Any], varlen: bool) -> None:
    """It was refused for want of room for an answer, which nobody wants."""
    engine = make_engine(4, varlen=varlen, **settings)
    context = engine.model.config.max_position_embeddings
    prompt = [number % 50 for number in range(context)]
    (output,) = engine.generate([prompt], SamplingParams(seed=1, n=2, max_tokens=4, prompt_logprobs=3))
    assert_right(engine.model, prompt, output.prompt_logprobs)
    assert [len(completion.ids) for completion in output.completions] == [1, 1]
    with pytest.raises(UserError, match=f"{context + 1} tokens, but the model's context is {context}"):
        engine.generate([[1, *prompt]], ASKED)
    with pytest.raises(UserError, match=f"{context} tokens, but the model's context is {context}"):
        engine.generate([prompt], SamplingParams())


def test_what_the_cache_holds_is_read_again() -> None:
    engine = make_engine(2)
    prompt = list(range(10, 50))
    plain = SamplingParams(temperature=0.0, max_tokens=4, ignore_eos=True)
    run(engine, prompt, plain)
    assert cached_tokens(run(engine, prompt, plain)) == 32  # all but the block of the last token
    for _ in range(2):
        first, *others = run(engine, prompt, ASKED)
        assert_right(engine.model, prompt, first.prompt_logprobs)
        assert [delta.prompt_logprobs for delta in others] == [None] * 3
        assert cached_tokens([first, *others]) == 0
    assert cached_tokens(run(engine, prompt, plain)) == 32


def test_after_a_preemption_no_more_is_taken_from_the_cache_than_was_noted() -> None:
    """Meanwhile another request has read all of the same prompt."""
    engine = make_engine(3, max_step_tokens=8)
    prompt = list(range(10, 50))
    first = engine.add(prompt, ASKED)
    engine.step()  # 8 of 40 tokens
    scheduler = engine._parts().scheduler
    (sequence,) = scheduler.running
    scheduler._preempt(sequence)
    scheduler.waiting.clear()
    second = engine.add(prompt, SamplingParams(temperature=0.0, max_tokens=1))
    while second not in [request_id for request_id, _ in engine.step()]:
        pass
    scheduler.waiting.append(sequence)
    read: list[int] = []
    forward = engine.model.forward
    engine.model.forward = lambda tokens, *rest, **more: read.append(tokens.numel()) or forward(tokens, *rest, **more)  # type: ignore
    outcomes = []
    while engine.has_work:
        outcomes += engine.step()
    assert read[:4] == [8] * 4, "of 5 blocks the first is known, as is the one token behind it"
    assert {request_id for request_id, _ in outcomes} == {first}
    delta = outcomes[0][1]
    assert isinstance(delta, Delta)
    assert_right(engine.model, prompt, delta.prompt_logprobs)


def test_with_new_weights_they_are_the_new_models_from_the_beginning() -> None:
    engine, other = make_engine(4, max_step_tokens=8), tiny_model(5)
    prompt = list(range(10, 50))
    engine.add(prompt, ASKED)
    engine.step()
    engine.model.load_state_dict(other.state_dict())
    engine.weights_updated()
    deltas: list[Delta] = []
    while not deltas:
        deltas += [delta for _, delta in engine.step() if isinstance(delta, Delta)]
    engine.weights_updated()  # handed out already: the answer is read again, and the prompt not told again
    while engine.has_work:
        deltas += [delta for _, delta in engine.step() if isinstance(delta, Delta)]
    assert_right(other, prompt, deltas[0].prompt_logprobs)
    assert [delta.prompt_logprobs for delta in deltas[1:]] == [None] * 3


def test_prompts_that_begin_alike_are_read_together() -> None:
    """As the choices behind one question come: none waits for another's part of the cache, which it could not use."""
    engine = make_engine(6)
    read: list[int] = []
    forward = engine.model.forward
    engine.model.forward = lambda tokens, *rest, **more: read.append(tokens.numel()) or forward(tokens, *rest, **more)  # type: ignore
    engine.generate([[*range(10, 40), i] for i in range(50, 54)], ASKED)
    assert read == [4 * 31, 4, 4, 4]


def test_logits_are_held_of_a_few_tokens_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make_engine(7)
    monkeypatch.setattr(sys.modules["minnow.engine.prompt_logprobs"], "chunk_tokens", lambda *_: 16)
    rows: list[int] = []
    logits = engine.model.logits
    engine.model.logits = lambda hidden: rows.append(len(hidden)) or logits(hidden)  # type: ignore
    prompt = list(range(10, 110))
    (output,) = engine.generate([prompt], ASKED)
    assert rows == [16] * 6 + [3] + [1] * 4  # 99 tokens have one before them
    engine.model.logits = logits  # type: ignore[method-assign]
    assert_right(engine.model, prompt, output.prompt_logprobs)


def test_none_of_the_likeliest_or_nothing() -> None:
    engine = make_engine(8)
    prompt = list(range(10, 30))
    (all_three,), (alone,), (nothing,) = (
        engine.generate([prompt], SamplingParams(max_tokens=1, prompt_logprobs=count)) for count in (3, 0, None)
    )
    assert alone.prompt_logprobs is not None
    assert all_three.prompt_logprobs is not None
    assert alone.prompt_logprobs.top_logprobs is None
    assert alone.prompt_logprobs.logprobs == all_three.prompt_logprobs.logprobs
    assert nothing.prompt_logprobs is None
    with pytest.raises(UserError, match="prompt_logprobs is -1, but must be 0 or more"):
        SamplingParams(prompt_logprobs=-1)
