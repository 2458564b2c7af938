"""Pictures in the engine, against transformers and against readings that nothing cuts, sends away or shares."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import full_logits, picture, seeing_model, seeing_tokenizer, shown, tiny_model, tiny_tokenizer
from transformers import AutoModelForImageTextToText

from minnow.config import UserError
from minnow.engine import Completions, Engine, Prompt, SamplingParams
from minnow.engine.async_engine import AsyncEngine
from minnow.engine.blocks import BlockManager
from minnow.engine.cache import PagedCache, Window
from minnow.engine.grammar import regex_grammar
from minnow.engine.parts import Parts
from minnow.engine.runner import Runner
from minnow.engine.scheduler import Scheduler
from minnow.model.attention import CausalAttention
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.pretrained import save_pretrained
from minnow.model.quantize import quantize
from minnow.model.vision_language import ImagePixels, VisionLanguageModel
from minnow.tokenizer.chat import Rendered

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)
RAGGED: list[Prompt] = [
    shown(0),
    shown(text="No picture."),
    shown(1, 2, 3, text="Which of them is blue?"),
    [50, 60, 70],
    shown(4, 0, text="小鱼在池塘里"),
    shown(2, text=""),
]


def make_engine(seed: int = 0, **settings: Any) -> Engine:
    return Engine(seeing_model(seed), seeing_tokenizer(), **settings)


def answers(outputs: list[Completions]) -> list[list[list[int]]]:
    return [[completion.ids for completion in output.completions] for output in outputs]


def pixels_of(prompt: Prompt) -> torch.Tensor:
    """[I, 3, S, S] as transformers' processor hands them over; equality with it is tested beside `ImageFormat`."""
    assert isinstance(prompt, Rendered)
    image_format = seeing_tokenizer().require_images()
    return torch.from_numpy(np.stack([image_format.pixels(data) for data in prompt.images])) / 255.0 * 2 - 1


@pytest.mark.parametrize("frozen", [False, True], ids=["model", "packed"])
@pytest.mark.parametrize("seed", [0, 1])
def test_greedy_answers_are_those_of_transformers(tmp_path: Path, seed: int, frozen: bool) -> None:
    engine = make_engine(seed, frozen=frozen)
    save_pretrained(engine.model, tmp_path, seeing_tokenizer())
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    outputs = engine.generate(RAGGED, GREEDY)
    for prompt, output in zip(RAGGED, outputs, strict=True):
        seen = {"pixel_values": pixels_of(prompt)} if isinstance(prompt, Rendered) and prompt.images else {}
        with torch.no_grad():
            ids = torch.tensor([output.prompt_ids])
            expected = theirs.generate(ids, do_sample=False, max_new_tokens=12, **seen)
        assert output.completions[0].ids == expected[0, len(output.prompt_ids) :].tolist()
    other = engine.generate([shown(5)], GREEDY)
    assert answers(other) != answers(outputs[:1])  # what is shown matters


def test_penalties_count_image_tokens_as_transformers_does(tmp_path: Path) -> None:
    engine = make_engine()
    save_pretrained(engine.model, tmp_path, seeing_tokenizer())
    theirs = AutoModelForImageTextToText.from_pretrained(tmp_path)
    (output,) = engine.generate([shown(0, 1)], replace(GREEDY, repetition_penalty=1.7))
    with torch.no_grad():
        expected = theirs.generate(
            torch.tensor([output.prompt_ids]),
            pixel_values=pixels_of(shown(0, 1)),
            do_sample=False,
            max_new_tokens=12,
            repetition_penalty=1.7,
        )
    assert output.completions[0].ids == expected[0, len(output.prompt_ids) :].tolist()
    assert answers([output]) != answers(engine.generate([shown(0, 1)], GREEDY))


def small_cache(engine: Engine, blocks: int) -> Engine:
    """Blocks of 8 tokens, exactly so many: a context of 128 needs 16."""
    config, where = engine.model.config, (torch.float32, torch.device("cpu"))
    runner = Runner(PagedCache(config, blocks, 8, *where), Window(config, 16, *where))
    engine._made = Parts(Scheduler(BlockManager(blocks, 8), 16, 10_000), runner)
    return engine


@pytest.mark.parametrize("frozen", [False, True], ids=["model", "packed"])
@pytest.mark.parametrize("settings", [{"max_step_tokens": 3}, {"max_step_tokens": 7, "max_rows": 2}], ids=str)
def test_a_picture_cut_in_two_is_the_same_picture(settings: dict[str, Any], frozen: bool) -> None:
    params = SamplingParams(seed=3, n=2, max_tokens=6, ignore_eos=True)
    engine = make_engine(frozen=frozen, **settings)
    assert answers(engine.generate(RAGGED, params)) == answers(make_engine().generate(RAGGED, params))


def test_whoever_made_room_is_read_again_with_its_pictures() -> None:
    params = SamplingParams(seed=3, n=2, max_tokens=40, ignore_eos=True)
    engine = small_cache(make_engine(), 20)
    looked = count_looks(engine)
    assert answers(engine.generate(RAGGED, params)) == answers(make_engine().generate(RAGGED, params))
    assert engine._parts().scheduler.preemptions > 3
    assert sum(looked) == 7  # once each, however often the prompts were read


def count_looks(engine: Engine) -> list[int]:
    """Filled with the number of pictures of every pass through the tower."""
    model, looked = engine.model, []
    assert isinstance(model, VisionLanguageModel)
    embed = model.embed_images
    model.embed_images = lambda pixels: looked.append(len(pixels)) or embed(pixels)  # type: ignore[method-assign, func-returns-value]
    return looked


def test_samples_share_one_look_and_pictures_of_one_step_share_a_pass() -> None:
    engine = make_engine()
    looked = count_looks(engine)
    engine.generate([shown(0, 1), shown(2)], SamplingParams(n=3, max_tokens=4))
    assert looked == [3]


def test_the_same_words_with_another_picture_are_not_found_in_the_cache() -> None:
    long = "What swims in the pond where the little minnow lives?"
    engine = make_engine(block_size=4)
    looked = count_looks(engine)

    def ask(*seeds: int) -> tuple[list[list[list[int]]], int]:
        deltas = list(engine.stream(shown(*seeds, text=long), GREEDY))
        assert deltas[0].cached_tokens is not None
        return [[[delta.id for delta in deltas]]], deltas[0].cached_tokens

    def fresh(*seeds: int) -> list[list[list[int]]]:
        return answers(make_engine(block_size=4).generate([shown(*seeds, text=long)], GREEDY))

    length = len(shown(0, text=long).ids)
    before = shown(0, text=long).ids.tolist().index(seeing_tokenizer().image_id) // 4 * 4
    assert ask(0) == (fresh(0), 0)
    assert ask(5) == (fresh(5), before)
    assert ask(0) == (fresh(0), (length - 1) // 4 * 4)
    assert looked == [1, 1]  # what is found in the cache is not looked at again
    assert ask(0, 5)[0] == fresh(0, 5)
    assert ask(5, 0)[0] == fresh(5, 0)
    assert fresh(0) != fresh(5)


def test_after_new_weights_pictures_are_looked_at_again() -> None:
    engine, new = make_engine(), make_engine(1)
    params = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
    engine.add(shown(0), params)
    said = [delta.id for _ in range(5) for _, delta in engine.step()]  # type: ignore[union-attr]
    engine.model.load_state_dict(new.model.state_dict())
    engine.weights_updated()
    while engine.has_work:
        said += [delta.id for _, delta in engine.step()]  # type: ignore[union-attr]
    prompt = shown(0)
    continued = replace(prompt, ids=np.array([*prompt.ids, *said[:5]], np.int32))
    (expected,) = new.generate([continued], replace(params, max_tokens=15))
    assert said[5:] == expected.completions[0].ids


def test_an_aborted_request_leaves_the_others_alone() -> None:
    engine = make_engine(max_step_tokens=12)
    first = engine.add(shown(0, 1), GREEDY)
    second = engine.add(shown(2), GREEDY)
    engine.step()  # the first prompt is half read
    engine.abort(first)
    said = []
    while engine.has_work:
        said += engine.step()
    assert {request_id for request_id, _ in said} == {second}
    assert [[[delta.id for _, delta in said]]] == answers(make_engine().generate([shown(2)], GREEDY))  # type: ignore[union-attr]


@pytest.mark.parametrize("max_step_tokens", [5, 1000])
def test_prompt_logprobs_are_those_of_a_plain_pass(max_step_tokens: int) -> None:
    engine, prompt = make_engine(max_step_tokens=max_step_tokens), shown(0, 1)
    (output,) = engine.generate([prompt], replace(GREEDY, prompt_logprobs=0))
    ids = torch.tensor(prompt.ids)[None].long()
    pixels = torch.from_numpy(np.stack([seeing_tokenizer().require_images().pixels(data) for data in prompt.images]))
    places = (ids[0] == seeing_tokenizer().image_id).nonzero()[:, 0]
    positions = torch.arange(ids.shape[1])[None]
    with torch.no_grad():
        hidden = engine.model(ids, positions, CausalAttention(), images=ImagePixels(pixels, places))
        logprobs = engine.model.logits(hidden)[0].log_softmax(-1)
    expected = logprobs[:-1].gather(1, ids[0, 1:, None])[:, 0]
    assert output.prompt_logprobs is not None
    torch.testing.assert_close(torch.tensor(output.prompt_logprobs.logprobs[1:]), expected, atol=1e-4, rtol=1e-4)


def test_a_grammar_binds_what_is_said_of_a_picture() -> None:
    params = SamplingParams(seed=0, max_tokens=20, grammar=regex_grammar("(red|blue) (fish|frog)"))
    (output,) = make_engine().generate([shown(0)], params)
    assert output.completions[0].text in {"red fish", "red frog", "blue fish", "blue frog"}


def test_rounding_to_int8_leaves_the_eyes_alone() -> None:
    engine = make_engine()
    quantize(engine.model)
    rounded = {name.split(".")[0] for name, p in engine.model.named_parameters() if p.dtype == torch.int8}
    assert rounded == {"model"}
    packed = Engine(engine.model, seeing_tokenizer(), frozen=True)
    assert answers(packed.generate(RAGGED, GREEDY)) == answers(engine.generate(RAGGED, GREEDY))


def test_an_adapter_answers_about_pictures_as_its_merged_model_does(tmp_path: Path) -> None:
    save_pretrained(seeing_model(), tmp_path / "base", seeing_tokenizer())
    model = seeing_model()
    add_lora(model, LoraConfig(rank=2), base=str(tmp_path / "base"))
    draw_adapter = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in (p for p in model.parameters() if p.requires_grad):
            parameter.add_(torch.empty(parameter.shape).uniform_(-0.4, 0.4, generator=draw_adapter))
    save_pretrained(model, tmp_path / "adapter", seeing_tokenizer())
    engine = make_engine(adapters={"tuned": tmp_path / "adapter"})
    merged = Engine.from_pretrained(tmp_path / "adapter")
    assert isinstance(merged.model, VisionLanguageModel)
    tuned = engine.generate(RAGGED, replace(GREEDY, adapter="tuned"))
    assert answers(tuned) == answers(merged.generate(RAGGED, GREEDY))
    assert answers(tuned) != answers(engine.generate(RAGGED, GREEDY))


IMAGE_ID = seeing_tokenizer().image_id


@pytest.mark.parametrize(
    "prompt",
    [
        [50, *[IMAGE_ID] * 4, 60],
        [50, *[IMAGE_ID] * 5, 60],
        shown(0, 1).ids.tolist(),
        replace(shown(0, 1), images=(picture(0),)),
        replace(shown(0), images=(picture(0), picture(1))),
        replace(shown(), images=(picture(0),)),
        replace(shown(0), ids=np.array([50, *[IMAGE_ID] * 2, 60, *[IMAGE_ID] * 2], np.int32)),
    ],
    ids=["four", "five", "ids", "picture missing", "tokens missing", "no tokens", "torn apart"],
)
def test_image_tokens_without_their_pictures_are_refused(prompt: Prompt) -> None:
    engine = make_engine()
    for ask in (
        lambda: engine.generate([prompt], GREEDY),
        lambda: engine.stream(prompt, GREEDY),
        lambda: engine.add(prompt),
    ):
        with pytest.raises(UserError, match="image tokens are not those of"):
            ask()
    assert not engine.has_work


def test_image_tokens_that_the_model_wrote_are_tokens_when_a_dialogue_goes_on() -> None:
    """Rollouts and clients that keep ids send an answer back as it was sampled."""
    engine = make_engine()
    params = SamplingParams(temperature=0.0, max_tokens=2, logit_bias={IMAGE_ID: 100.0}, ignore_eos=True)
    for prompt in ([50, 60], shown(0)):
        (said,) = answers(engine.generate([prompt], params))
        assert said == [[IMAGE_ID] * 2]
        before = prompt.ids.tolist() if isinstance(prompt, Rendered) else prompt
        ids = np.array([*before, *said[0], 70], np.int32)
        again = replace(prompt, ids=ids) if isinstance(prompt, Rendered) else ids.tolist()
        cached = engine.generate([again], GREEDY)
        assert answers(cached) == answers(make_engine().generate([again], GREEDY))
        if not isinstance(prompt, Rendered):
            logits = full_logits(engine.model, ids.tolist())
            assert cached[0].completions[0].ids[0] == int(logits[-1].argmax())


def test_what_was_seen_is_let_go_with_the_request(monkeypatch: pytest.MonkeyPatch) -> None:
    engine, requests = make_engine(max_rows=1), []
    submit = engine._submit
    monkeypatch.setattr(engine, "_submit", lambda request: requests.append(request) or submit(request))
    deliver, held = engine._deliver, []
    monkeypatch.setattr(engine, "_deliver", lambda: deliver() or held.append(sum(len(r.seen) for r in requests)))
    engine.generate([shown(seed) for seed in range(4)], GREEDY)
    assert max(held) == 1


def test_a_broken_picture_is_refused_before_anything_is_queued() -> None:
    engine = make_engine()
    with pytest.raises(UserError, match="not a picture that can be read"):
        engine.generate([shown(1), replace(shown(0), images=(b"no picture",))])
    assert not engine.has_work
    assert engine._made is None  # nothing was set aside for it


def test_a_model_that_only_reads_says_so() -> None:
    with pytest.raises(UserError, match="reads text only"):
        Engine(tiny_model(), tiny_tokenizer()).generate([shown(0)])


def test_the_asynchronous_engine_looks_too() -> None:
    async def ask() -> list[int]:
        engine = AsyncEngine(make_engine(), max_answers=1)
        try:
            with pytest.raises(UserError, match="not a picture"):
                await engine.submit(replace(shown(0), images=(b"",)), GREEDY)
            assert engine.in_flight == 0
            return [delta.id async for delta in engine.stream(shown(0), GREEDY)]
        finally:
            engine.close()

    assert [[asyncio.run(ask())]] == answers(make_engine().generate([shown(0)], GREEDY))
