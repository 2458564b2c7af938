"""Several adapters on one base in one batch: each answer is the one of that adapter's merged model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from engine_helpers import random_prompts, tiny_model, tiny_tokenizer

from minnow.config import UserError
from minnow.engine.engine import Engine
from minnow.engine.sampling import SamplingParams
from minnow.model.lora import LoraConfig, add_lora
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.switched import AdapterChoice, SwitchedLinear

SETTINGS = {
    "plain": LoraConfig(rank=4),
    "dora": LoraConfig(rank=2, dora=True, targets=("q_proj", "mlp.down_proj")),
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("adapters")
    save_pretrained(tiny_model(), folder / "base", tiny_tokenizer())
    for number, (name, settings) in enumerate(SETTINGS.items()):
        model = tiny_model()
        add_lora(model, settings, base=str(folder / "base"))
        generator = torch.Generator().manual_seed(number)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.empty(parameter.shape).uniform_(-0.4, 0.4, generator=generator))
        save_pretrained(model, folder / name, tiny_tokenizer())
    return {name: folder / name for name in (*SETTINGS, "base")}


def params(adapter: str | None, **more) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_tokens=12, ignore_eos=True, logprobs=True, adapter=adapter, **more)


def alone(folder: Path, prompts: list[list[int]]):
    return Engine(load_pretrained(folder), tiny_tokenizer()).generate(prompts, params(None))


def served(folders: dict[str, Path], **settings) -> Engine:
    adapters = {name: folders[name] for name in SETTINGS}
    return Engine(load_pretrained(folders["base"]), tiny_tokenizer(), adapters=adapters, **settings)


@pytest.mark.parametrize("settings", [{}, {"max_step_tokens": 7}, {"max_rows": 2}, {"frozen": True}], ids=str)
def test_a_mixed_batch_answers_as_each_model_alone(folders: dict[str, Path], settings) -> None:
    prompts = random_prompts(9)
    names = ["plain", "dora", "base"] * 3
    mixed = served(folders, **settings).generate(prompts, [params(None if name == "base" else name) for name in names])
    for name, folder in folders.items():
        for expected, (chosen, found) in zip(alone(folder, prompts), zip(names, mixed, strict=True), strict=True):
            if chosen == name:
                assert found.completions[0].ids == expected.completions[0].ids
                torch.testing.assert_close(
                    torch.tensor(found.completions[0].raw_logprobs),
                    torch.tensor(expected.completions[0].raw_logprobs),
                    rtol=1e-4,
                    atol=1e-4,
                )
    answers = {name: [r.completions[0].ids for r in alone(folder, prompts)] for name, folder in folders.items()}
    assert answers["plain"] != answers["dora"] != answers["base"]


def test_one_adapters_prefix_is_not_anothers(folders: dict[str, Path]) -> None:
    engine = served(folders)
    prompt = random_prompts(1, seed=5)[0] * 40
    prompt = prompt[:100]
    for name in ("plain", "dora", None):
        (first,) = engine.generate([prompt], params(name))
        folder = folders[name or "base"]
        assert first.completions[0].ids == alone(folder, [prompt])[0].completions[0].ids
        (again,) = engine.generate([prompt], params(name))
        assert again.completions[0].ids == first.completions[0].ids


def test_the_model_itself_stays_the_base(folders: dict[str, Path], tmp_path: Path) -> None:
    engine = served(folders)
    base = load_pretrained(folders["base"])
    assert engine.model.state_dict().keys() == base.state_dict().keys()
    engine.generate([[5, 6]], params("plain"))
    save_pretrained(engine.model, tmp_path / "saved")
    for name, tensor in load_pretrained(tmp_path / "saved").state_dict().items():
        assert torch.equal(tensor, base.state_dict()[name])


def test_a_new_adapter_of_a_name_is_the_only_one_and_drops_nothing_out(folders: dict[str, Path]) -> None:
    """The earlier one's layers that it has not are the base's again; dropout is of training only."""
    engine = served(folders)
    engine.adapters.put("plain", engine.adapters.read(folders["dora"]))
    switched = {name: m.adapters for name, m in engine.model.named_modules() if isinstance(m, SwitchedLinear)}
    having = {name for name, adapters in switched.items() if "plain" in adapters}
    assert having
    assert having == {name for name in switched if name.endswith((".q_proj", "mlp.down_proj"))}
    assert not any(adapter.training for adapters in switched.values() for adapter in adapters.values())


def test_a_choice_is_over_with_its_pass_even_after_an_error() -> None:
    """What nobody chooses for goes through the base alone: tokens of an earlier pass have no say."""
    choice, found = AdapterChoice(), {}

    def step() -> None:
        with choice.of([("a", 2), (None, 3), ("a", 1), ("b", 1)], torch.device("cpu")):
            found.update({name: places.tolist() for name, places in choice.places.items()})
            raise RuntimeError

    with pytest.raises(RuntimeError):
        step()
    assert found == {"a": [0, 1, 5], "b": [6]}
    assert choice.places == {}


def test_refused(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="there is no adapter 'other' here; there are: dora, plain"):
        served(folders).generate([[5]], params("other"))
    with pytest.raises(UserError, match="there are: none"):
        Engine(tiny_model(), tiny_tokenizer()).generate([[5]], params("plain"))
    with pytest.raises(UserError, match="no linear layer"):
        Engine(tiny_model(num_hidden_layers=1), tiny_tokenizer(), adapters={"plain": folders["plain"]})
    with pytest.raises(UserError, match="a whole model, not an adapter"):
        Engine(tiny_model(), tiny_tokenizer(), adapters={"plain": folders["base"]})


def test_another_adapter_takes_a_names_place(folders: dict[str, Path]) -> None:
    """With fewer layers, in the midst of an answer: the rest is what the new one says after the same beginning."""
    engine = served(folders)
    prompt = random_prompts(1, seed=3)[0]
    request = engine.add(prompt, params("plain"))
    said = [engine.step()[0][1].id for _ in range(4)]
    engine.adapters.put("plain", engine.adapters.read(folders["dora"]))
    engine.weights_updated()
    while engine.has_work:
        said += [delta.id for id, delta in engine.step() if id == request]
    (rest,) = alone(folders["dora"], [prompt + said[:4]])
    assert said[4:] == rest.completions[0].ids[:8]
    (old,) = alone(folders["plain"], [prompt])
    assert said[:4] == old.completions[0].ids[:4]
    assert said != old.completions[0].ids
