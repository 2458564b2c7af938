"""Adapters over HTTP: chosen by `model`, in one batch with their base, each saying what its merged model says."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

import minnow
from minnow.config import UserError, parse_config
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.stages.serve import Config, build_app, name_models, place_adapters, run
from minnow.tokenizer import train_tokenizer

from ..stages.stage_helpers import save_lively_model, save_random_adapter, save_random_model
from .serving_helpers import Running, running_app

SETTINGS: dict[str, dict[str, Any]] = {"plain": {}, "dora": {"rank": 2, "dora": True, "targets": ("q_proj", "mlp.*")}}
PROMPT = "the little minnow swims in the pond. " * 4
"""Long enough to be found in the cache."""
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_tokens": 12, "ignore_eos": True}
TEXTS = ["the little minnow swims", "小鱼在池塘里", "pond"]


def app_of(models: list[str], adapters: list[str], **settings: Any) -> Any:
    config = Config(models=tuple(models), adapters=tuple(adapters), device="cpu", precision="fp32", **settings)
    named = name_models(config.models)
    return build_app(config, named, place_adapters(config.adapters, named), local=True)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    base = save_lively_model(folder / "base", context=512)
    made = {
        name: save_random_adapter(folder / name, base, seed, **settings)
        for seed, (name, settings) in enumerate(SETTINGS.items())
    }
    return {"base": base, **made}


@pytest.fixture(scope="module")
def served(folders: dict[str, Path]) -> Iterator[Running]:
    """`base` with the adapters `plain` and `dora`, and the two merged: a folder of an adapter is served so."""
    merged = [f"merged-{name}={folders[name]}" for name in SETTINGS]
    adapters = [f"{name}={folders[name]}" for name in SETTINGS]
    with running_app(app_of([str(folders["base"]), *merged], adapters)) as running:
        yield running


def test_they_are_listed_with_their_parent(served: Running) -> None:
    cards = served.client().models.list().data
    assert [(card.id, card.parent) for card in cards] == [  # type: ignore[attr-defined]
        ("base", None),
        ("plain", "base"),
        ("dora", "base"),
        ("merged-plain", None),
        ("merged-dora", None),
    ]
    assert served.client().models.retrieve("dora").max_model_len == 512  # type: ignore[attr-defined]


async def _at_once(client: openai.AsyncOpenAI, names: list[str]) -> dict[tuple[str, str], str]:
    """What each model answers to each text, all asked together: (name, text) -> chat answer and completion."""

    async def one(name: str, text: str) -> str:
        ask: Any = [{"role": "user", "content": text}]
        chat = await client.chat.completions.create(
            model=name, messages=ask, temperature=0, max_tokens=20, extra_body={"ignore_eos": True}
        )
        more: Any = {"ignore_eos": True, "return_token_ids": True}
        stream = await client.completions.create(
            model=name, prompt=text, temperature=0, max_tokens=20, stream=True, extra_body=more
        )
        ids: list[int] = []
        async for chunk in stream:
            assert chunk.model == name
            ids += chunk.choices[0].token_ids  # type: ignore[attr-defined]
        assert len(ids) == 20
        return f"{chat.choices[0].message.content} {ids}"

    asked = [(name, text) for text in TEXTS for name in names]
    return dict(zip(asked, await asyncio.gather(*(one(*each) for each in asked)), strict=True))


def test_a_shared_batch_says_what_the_merged_models_say(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    names = ["base", "plain", "dora"]
    together: list[set[str | None]] = []
    choice = served.engines["base"].engine.adapters.choice
    of = choice.of
    monkeypatch.setattr(choice, "of", lambda spans, device: together.append({n for n, _ in spans}) or of(spans, device))
    assert served.engines["base"] is served.engines["plain"] is served.engines["dora"]
    found = asyncio.run(_at_once(served.async_client(), names))
    assert {None, "plain", "dora"} in together, "no step held all three"
    expected = asyncio.run(_at_once(served.async_client(), ["merged-plain", "merged-dora"]))
    for text in TEXTS:
        answers = {name: found[name, text] for name in names}
        assert len(set(answers.values())) == 3
        assert answers["plain"] == expected["merged-plain", text]
        assert answers["dora"] == expected["merged-dora", text]


def test_embeddings_go_through_the_adapter(served: Running) -> None:
    client = served.client()

    def vectors(name: str) -> list[list[float]]:
        return [item.embedding for item in client.embeddings.create(model=name, input=TEXTS).data]

    for name in SETTINGS:
        for found, expected, base in zip(vectors(name), vectors(f"merged-{name}"), vectors("base"), strict=True):
            assert found == pytest.approx(expected, abs=1e-5)
            assert found != pytest.approx(base, abs=1e-2)


def test_their_cached_prefixes_are_apart(served: Running) -> None:
    """The same long prompt, asked of one after the other: only who has read it itself finds it in the cache."""
    first: dict[str, str] = {}
    for round_ in range(2):
        for name in ("plain", "base", "dora"):
            answer = served.client().completions.create(
                model=name, prompt=PROMPT, temperature=0, max_tokens=12, extra_body={"ignore_eos": True}
            )
            assert answer.usage is not None
            assert answer.usage.prompt_tokens_details is not None
            assert bool(answer.usage.prompt_tokens_details.cached_tokens) == bool(round_)
            assert first.setdefault(name, answer.choices[0].text) == answer.choices[0].text
    assert len(set(first.values())) == 3


def test_unknown_names_and_metrics(served: Running) -> None:
    with pytest.raises(openai.NotFoundError, match="base, plain, dora, merged-plain, merged-dora"):
        served.client().completions.create(model="other", prompt="x")
    served.client().completions.create(model="dora", prompt="x", max_tokens=3, extra_body={"ignore_eos": True})
    lines = httpx.get(f"{served.url}/metrics").text.splitlines()
    assert any(line.startswith('minnow_generated_tokens_total{model="dora"}') for line in lines)
    # One engine, counted once.
    assert sum("in_flight{" in line for line in lines) == 3


def test_reloading(folders: dict[str, Path], tmp_path: Path) -> None:
    """Another adapter under the same name, with other layers and rank; then another base under the adapters."""
    base = folders["base"]
    second = save_random_adapter(tmp_path / "second", base, 7, rank=3, targets=("v_proj", "o_proj", "mlp.*"))
    narrow = save_random_model(tmp_path / "narrow")
    stranger = save_random_adapter(tmp_path / "stranger", base, 8)
    (stranger / "adapter_model.safetensors").write_bytes(b"")
    with running_app(app_of([str(base)], [f"a={folders['plain']}", f"b={folders['dora']}"], api_key="k")) as running:
        client = running.client(api_key="k")

        def say(name: str) -> str:
            more: Any = {"ignore_eos": True}
            ask = client.completions.create
            return ask(model=name, prompt=PROMPT, temperature=0, max_tokens=12, extra_body=more).choices[0].text

        def reload(**body: str) -> httpx.Response:
            return httpx.post(f"{running.url}/admin/reload", json=body, headers={"Authorization": "Bearer k"})

        first, b, new = (
            minnow.load(folder, device="cpu", precision="fp32").generate(PROMPT, **GREEDY)
            for folder in (folders["plain"], folders["dora"], second)
        )
        before = say("base")
        assert (say("a"), say("b")) == (first, b)
        answer = reload(model="a", folder=str(second))
        assert answer.json()["parent"] == "base"
        assert (say("a"), say("b"), say("base")) == (new, b, before)
        for folder, reason in ((narrow, "a whole model"), (stranger, "not a whole safetensors file")):
            answer = reload(model="a", folder=str(folder))
            assert (answer.status_code, reason in answer.json()["error"]["message"]) == (400, True), answer.text
        assert say("a") == new
        # The base takes the merged weights of `dora`; the adapter b then stands on those.
        assert reload(model="base", folder=str(folders["dora"])).status_code == 200
        assert say("base") == b
        assert say("b") != b
        assert reload(model="base").status_code == 200
        assert reload(model="a").status_code == 200  # the folders they came from
        assert (say("a"), say("b"), say("base")) == (first, b, before)


def test_what_does_not_fit_is_refused_at_the_start(folders: dict[str, Path], tmp_path: Path) -> None:
    base, plain = folders["base"], folders["plain"]
    named = name_models([str(base)])

    def refused(match: str, *adapters: str, models: dict[str, Path] = named) -> None:
        with pytest.raises(UserError, match=match) as raised:
            place_adapters(adapters, models)
        assert "\n" not in str(raised.value)

    refused("write NAME=ADAPTER", str(plain))
    refused("write NAME=ADAPTER", f"={plain}")
    refused("base is the name of another model", f"base={plain}")
    refused("a is the name of another model", f"a={plain}", f"a={folders['dora']}")
    refused("no such folder", f"a={tmp_path / 'nowhere'}")
    refused("holds a whole model", f"a={base}")
    refused("no model is served as 'other', only base", f"a@other={plain}")
    other = save_random_model(tmp_path / "other")
    refused("is not served, only other; .* NAME@MODEL=ADAPTER", f"a={plain}", models=name_models([str(other)]))
    refused("served as x and y", f"a={plain}", models=name_models([f"x={base}", f"y={base}"]))
    assert place_adapters([f"a@y={plain}"], name_models([f"x={base}", f"y={base}"]))["a"].parent == "y"
    assert place_adapters([f"a={plain}"], name_models([f"x={other}", f"y={base}"]))["a"].parent == "y"


def test_the_command_line_takes_several() -> None:
    words = ["base", "more", "--adapters", "a=x,b@more=y", "--adapters", "c=z"]
    config = parse_config(Config, words, program="minnow serve")
    assert (config.models, config.adapters) == (("base", "more"), ("a=x", "b@more=y", "c=z"))


def test_compiling_is_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="--compile"):
        run(Config(models=(str(folders["base"]),), adapters=(f"a={folders['plain']}",), compile=True, port=0))


def test_an_adapter_of_another_shape_or_tokenizer_is_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    wide = save_random_model(tmp_path / "wide", hidden_size=32)
    with pytest.raises(UserError, match=r"another rank than this model's \(.*\(16, 4\) there, \(32, 4\) here\)"):
        app_of([str(wide)], [f"a@wide={folders['plain']}"])
    tokenizer = train_tokenizer(["something else entirely"] * 20, 320)
    save_pretrained(load_pretrained(folders["base"]), tmp_path / "other", tokenizer)
    with pytest.raises(UserError, match="another tokenizer"):
        app_of([str(tmp_path / "other")], [f"a@other={folders['plain']}"])
