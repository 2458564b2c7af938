"""What commands that are not about pictures do with a model that looks at them: it keeps its eyes, or they say no."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
import transformers

from minnow import cli
from minnow.config import UserError, parse_config
from minnow.export import hub
from minnow.model.attention import PackedAttention
from minnow.model.lora import LoraConfig, add_lora, linear_names, lora_layers
from minnow.model.pretrained import load_pretrained, load_reward_model, load_with_adapter, save_pretrained
from minnow.model.quantize import load_quantized
from minnow.model.reward_model import RewardModel
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.tokenizer import Tokenizer
from minnow.training.forward import images_of
from tests.training.distributed.stages import STAGES, write_world
from tests.training.seeing import PictureRows, mixed, seeing, seeing_model, shape

SHORT = {"training.steps": 2, "training.validate_every": 0}
PLAYED = {"phases": 1}
CONTINUED = ("pretrain", {k: v for k, v in STAGES["pretrain"][1].items() if not k.startswith("model.")} | SHORT)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder)
    (folder / "start").rename(folder / "reading")
    seeing_model(folder / "start", max_position_embeddings=128)
    return folder


def run(command: str, settings: dict[str, Any], folder: Path) -> Path:
    words = [word for key, value in (settings | {"run": folder}).items() for word in (f"--{key}", str(value))]
    stage = importlib.import_module(f"minnow.stages.{cli.COMMANDS[command].module}")
    stage.run(parse_config(stage.Config, cli.with_preset(command, words), program=f"minnow {command}"))
    return folder / "model"


def settings_of(name: str, world: Path, cache: Path) -> tuple[str, dict[str, Any]]:
    """The command that the stage of this name is, with two updates and the model that sees as its start."""
    command, settings = CONTINUED if name == "pretrain" else STAGES[name]
    data = {"pretrain": "texts", "dpo": "pairs", "reward": "pairs"}.get(command, "talks")
    places: dict[str, Any] = {"init_from": world / "start"}
    if command in ("grpo", "ppo"):
        return command, settings | PLAYED | places | dict.fromkeys(("prompts", "held_out"), world / "prompts.jsonl")
    places |= {"data.paths": world / f"{data}.jsonl", "data.cache_dir": cache}
    return command, {k: v for k, v in settings.items() if not k.startswith("model.")} | SHORT | places


def parts_changed(before: CausalLM, after: CausalLM) -> set[str]:
    old, new = before.state_dict(), after.state_dict()
    assert old.keys() == new.keys()
    return {name.split(".")[0] for name, tensor in old.items() if not torch.equal(tensor, new[name])}


@pytest.mark.parametrize("name", ["pretrain", "sft", "dpo", "distill", "grpo", "ppo"])
def test_training_on_text_leaves_tower_and_projector_as_they_are(name: str, world: Path, tmp_path: Path) -> None:
    command, settings = settings_of(name, world, tmp_path)
    if command == "distill":
        settings["teacher"] = world / "start"
    folder = run(command, settings, tmp_path / "run")
    assert parts_changed(load_pretrained(world / "start"), load_pretrained(folder)) == {"model"}
    assert Tokenizer.from_pretrained(folder).image_format is not None
    assert (folder / "preprocessor_config.json").is_file()


@pytest.mark.parametrize("name", ["lora", "grpo of adapters"])
@pytest.mark.parametrize("quantize", ["none", "int8"])
def test_adapters_stand_beside_the_decoder_alone(name: str, quantize: str, world: Path, tmp_path: Path) -> None:
    command, settings = settings_of(name, world, tmp_path)
    folder = run(command, settings | {"lora.rank": 2, "lora.quantize": quantize}, tmp_path / "run")
    model = load_with_adapter(folder)
    assert lora_layers(model)
    assert all(layer.startswith("model.layers.") for layer in lora_layers(model))
    merged = load_pretrained(folder)
    assert isinstance(merged, VisionLanguageModel)
    assert parts_changed(load_pretrained(world / "start"), merged) == {"model"}
    assert Tokenizer.from_pretrained(folder).image_format == merged.image_format


def test_a_merged_adapter_is_a_model_with_eyes(world: Path, tmp_path: Path) -> None:
    base, _ = seeing()
    add_lora(base, LoraConfig(rank=2), base=str(world / "start"))
    save_pretrained(base, tmp_path / "adapter", Tokenizer.from_pretrained(world / "start"))
    assert cli.main(["merge-lora", str(tmp_path / "adapter"), "--out", str(tmp_path / "merged")]) == 0
    merged = load_pretrained(tmp_path / "merged")
    assert isinstance(merged, VisionLanguageModel)
    assert Tokenizer.from_pretrained(tmp_path / "merged").image_format == merged.image_format
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path / "merged")).__name__ == "LlavaProcessor"


@pytest.mark.parametrize("targets", [("*_proj",), ("q_proj", "down_proj"), ("gate_proj",)])
def test_peft_loads_our_adapter_and_we_load_pefts(world: Path, tmp_path: Path, targets: tuple[str, ...]) -> None:
    """The tower has a q_proj too: names that end so must not reach it."""
    model = load_pretrained(world / "start")
    add_lora(model, LoraConfig(rank=2, targets=targets), base=str(world / "start"))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            layer.lora_B.weight.normal_(0, 0.3, generator=generator)
    save_pretrained(model, tmp_path / "ours")
    theirs = peft.PeftModel.from_pretrained(
        transformers.AutoModelForImageTextToText.from_pretrained(world / "start"), tmp_path / "ours"
    ).eval()
    tokenizer = Tokenizer.from_pretrained(world / "start")
    rows = PictureRows(tokenizer, mixed(3)[2:])  # two pictures
    batch, length = rows.batch([0]), len(rows.examples[0].ids) - 1
    assert batch.pixels_ICHW is not None
    attention = PackedAttention(batch.cu_seqlens, torch.device("cpu"))

    def logits(of: CausalLM) -> torch.Tensor:
        with torch.no_grad():
            return of.logits(of(batch.tokens_BT, batch.positions_BT, attention, images=images_of(batch)))[:, :length]

    with torch.no_grad():
        expected = theirs(
            input_ids=batch.tokens_BT[:, :length], pixel_values=(batch.pixels_ICHW.float() / 255 - 0.5) / 0.5
        ).logits
    torch.testing.assert_close(logits(model), expected, atol=1e-4, rtol=1e-4)
    assert (logits(load_pretrained(world / "start")) - expected).abs().max() > 1e-2
    theirs.save_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(logits(load_with_adapter(tmp_path / "theirs")), expected, atol=1e-4, rtol=1e-4)
    assert not any("vision" in name for name in linear_names(load_pretrained(world / "start")))


def test_an_adapter_of_the_tower_is_refused(world: Path, tmp_path: Path) -> None:
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(world / "start")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(theirs, config).save_pretrained(tmp_path / "theirs")
    with pytest.raises(
        UserError, match=r"it adapts model\.vision_tower\..*no linear layer of the base model's decoder"
    ):
        load_with_adapter(tmp_path / "theirs")


def test_a_judge_is_made_of_the_decoder_alone(world: Path, tmp_path: Path) -> None:
    command, settings = settings_of("reward", world, tmp_path)
    folder = run(command, settings, tmp_path / "run")
    assert isinstance(load_reward_model(folder), RewardModel)
    assert not (folder / "preprocessor_config.json").exists()
    assert Tokenizer.from_pretrained(folder).image_format is None
    with pytest.raises(UserError, match="lora.rank.*looks at pictures"):
        run(command, settings | {"lora.rank": 2}, tmp_path / "other")


@pytest.mark.parametrize(("student", "teacher"), [("start", "reading"), ("reading", "start"), (None, "start")])
def test_student_and_teacher_meet_on_texts_where_one_of_them_only_reads(
    world: Path, tmp_path: Path, student: str | None, teacher: str
) -> None:
    for name in ("start", "reading"):  # one tokenizer
        tokenizer = seeing()[1]
        model = load_pretrained(world / "start") if name == "start" else CausalLM(shape(tokenizer, **LONG))
        save_pretrained(model, tmp_path / name, tokenizer)
    _, settings = settings_of("distill", world, tmp_path)
    settings["teacher"] = tmp_path / teacher
    if student is None:
        del settings["init_from"]
        settings |= {key: value for key, value in STAGES["distill"][1].items() if key.startswith("model.")}
    else:
        settings["init_from"] = tmp_path / student
    folder = run("distill", settings, tmp_path / "run")
    sees = student == "start"
    assert isinstance(load_pretrained(folder), VisionLanguageModel) == sees
    assert (Tokenizer.from_pretrained(folder).image_format is not None) == sees
    assert (folder / "processor_config.json").exists() == sees


LONG = {"max_position_embeddings": 128}


def test_upcycling_is_refused(world: Path, tmp_path: Path) -> None:
    _, settings = settings_of("pretrain", world, tmp_path)
    experts = {"model.experts.num_experts": 4, "model.experts.moe_intermediate_size": 48}
    with pytest.raises(UserError, match="looks at pictures: upcycle the language model"):
        run("pretrain", settings | experts, tmp_path / "run")


def test_a_longer_context_keeps_the_eyes(world: Path, tmp_path: Path) -> None:
    _, settings = settings_of("pretrain", world, tmp_path)
    longer = {"rope_scaling": "yarn", "sequence_length": 256}
    model = load_pretrained(run("pretrain", settings | longer, tmp_path / "run"))
    assert model.config.max_position_embeddings == 256
    model.config = load_pretrained(world / "start").config
    assert parts_changed(load_pretrained(world / "start"), model) == {"model"}


@pytest.mark.parametrize("to", ["ollama", "onnx"])
@pytest.mark.parametrize("adapter", [False, True])
def test_formats_that_only_read_are_refused_by_name(to: str, adapter: bool, world: Path, tmp_path: Path) -> None:
    folder = world / "start"
    if adapter:
        model = load_pretrained(folder)
        add_lora(model, LoraConfig(rank=2), base=str(folder))
        folder = tmp_path / "adapter"
        save_pretrained(model, folder, Tokenizer.from_pretrained(world / "start"))
    stage = importlib.import_module("minnow.stages.export")
    words = [str(folder), "--to", to, "--out", str(tmp_path / "out")]
    with pytest.raises(UserError, match=f"looks at pictures, and --to {to} would write a model that only reads"):
        stage.run(parse_config(stage.Config, words, program="minnow export"))
    assert not (tmp_path / "out").exists()


def test_the_hub_gets_the_processor_too(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[str] = []

    class StubApi:
        def create_repo(self, repo: str, **more: Any) -> None: ...

        def upload_folder(self, *, allow_patterns: list[str], **more: Any) -> SimpleNamespace:
            sent.extend(allow_patterns)
            return SimpleNamespace(repo_url="there")

    monkeypatch.setattr(hub, "HfApi", StubApi)
    seeing_model(tmp_path / "m")
    assert cli.main(["export", str(tmp_path / "m"), "--to", "hub", "me/it"]) == 0
    assert {"preprocessor_config.json", "processor_config.json", "chat_template.jinja", "config.json"} <= set(sent)
    assert 'AutoProcessor.from_pretrained("me/it")' in (tmp_path / "m" / "README.md").read_text()


def test_a_task_of_texts_is_scored_as_of_the_language_model_in_it(world: Path, tmp_path: Path) -> None:
    texts, pairs = world / "texts.jsonl", world / "pairs.jsonl"
    tokenizer = Tokenizer.from_pretrained(world / "start")
    model = load_pretrained(world / "start")
    bare = CausalLM(model.config)
    bare.load_state_dict({k: v for k, v in model.state_dict().items() if k.startswith(("model.", "lm_head."))})
    save_pretrained(bare, tmp_path / "bare", tokenizer)
    figures = []
    for name in (world / "start", tmp_path / "bare"):
        out = tmp_path / f"{name.name}.json"
        words = ["eval", str(name), "--tasks", "bpb,preference", "--text", str(texts), "--pairs", str(pairs)]
        assert cli.main([*words, "--max_rows", "8", "--json", str(out), "--device", "cpu"]) == 0
        figures.append([task["figures"] for task in json.loads(out.read_text())["tasks"].values()])
    assert figures[0] == figures[1]


def test_rounding_and_another_dtype_reach_what_they_should(world: Path) -> None:
    half = load_pretrained(world / "start", dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    rounded = load_quantized(world / "start", "int8")
    assert isinstance(rounded, VisionLanguageModel)
    assert any(parameter.dtype == torch.int8 for parameter in rounded.model.parameters())
    assert not any(parameter.dtype == torch.int8 for part in rounded.vision_modules for parameter in part.parameters())
