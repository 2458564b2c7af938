"""Every recipe parses, has the shape it names, and trains at a tiny setting."""

from __future__ import annotations

import base64
import dataclasses
import importlib
import itertools
import json
import operator
import re
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml

from minnow import cli
from minnow.config import parse_config
from minnow.data.pond.pictures import draw, scenes
from minnow.data.pond.world import World
from minnow.data.pond.write import write_pond
from minnow.model.config import ModelConfig
from minnow.model.presets import preset
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.settings import settings_of
from minnow.stages.dpo import Config as Dpo
from minnow.tokenizer import Tokenizer, train_tokenizer

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
SIZES = ("5m", "26m", "64m", "104m", "1.7b")
FURTHER = [recipe for recipe in RECIPES if not recipe.stem.startswith(("pretrain", "quickstart"))]
"""Recipes that train a trained model."""


def load(recipe: Path, *words: str) -> Any:
    stage = importlib.import_module(f"minnow.stages.{recipe.stem.partition('-')[0]}")
    # As the command does that the recipe names: the preset first.
    preset = re.search(r"minnow (ppo|grpo|spo) --config", recipe.read_text(encoding="utf-8"))
    files = [str(cli.PRESETS / f"{preset[1]}.yaml")] if preset else []
    words = tuple(word for file in (*files, str(recipe)) for word in ("--config", file)) + words
    return parse_config(stage.Config, list(words), program=recipe.name)


def needed(recipe: Path) -> list[str]:
    """What a recipe leaves to its user."""
    return [] if recipe.stem.startswith(("quickstart", "rl-")) else ["--data.paths", "data.jsonl"]


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: recipe.stem)
def test_parses(recipe: Path) -> None:
    load(recipe, *needed(recipe))


@pytest.mark.parametrize("recipe", FURTHER, ids=lambda recipe: recipe.stem)
def test_what_trains_further_says_only_what_differs_from_its_stage(recipe: Path) -> None:
    """But for the optimizer: rates mean something only beside its name."""
    stage = importlib.import_module(f"minnow.stages.{recipe.stem.partition('-')[0]}")
    defaults = {setting.key: setting.default for setting in settings_of(stage.Config)}
    config = load(recipe, *needed(recipe))
    written = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    keys = [f"{section}.{key}" for section in ("optim", "schedule") for key in written.get(section, {})]
    keys = [key for key in keys if key != "optim.optimizer"]
    assert not [key for key in keys if operator.attrgetter(key)(config) == defaults[key]]


@pytest.mark.parametrize(
    "recipe", [recipe for recipe in RECIPES if recipe.stem.startswith("dpo-")], ids=lambda p: p.stem
)
def test_another_preference_loss_has_a_beta_of_its_own_beside_a_recipe(recipe: Path) -> None:
    """SimPO at a recipe's 0.1, DPO's default, would want a margin of 10 nats a token."""
    loss = parse_config(Dpo, ["--config", str(recipe), "--loss.name", "simpo"], program="minnow dpo").loss
    assert loss.chosen_beta == 2.0


def test_every_size_has_both_recipes() -> None:
    names = {recipe.stem for recipe in RECIPES}
    assert {f"{stage}-{size}" for stage in ("pretrain", "sft") for size in SIZES} <= names


@pytest.mark.parametrize("size", SIZES)
def test_the_shape_is_the_preset(size: str) -> None:
    recipe = next(recipe for recipe in RECIPES if recipe.stem == f"pretrain-{size}")
    model = load(recipe, *needed(recipe)).model
    # the trained length belongs to the run, not to the shape
    length = preset(size).max_position_embeddings
    assert dataclasses.replace(model, max_position_embeddings=length) == preset(size)


@pytest.mark.parametrize("size", SIZES)
def test_sft_starts_from_what_pretraining_leaves(size: str) -> None:
    folder = RECIPES[0].parent
    pretrain, sft = folder / f"pretrain-{size}.yaml", folder / f"sft-{size}.yaml"
    assert load(sft, *needed(sft)).init_from == load(pretrain, *needed(pretrain)).run


def test_the_quickstart_recipe_is_what_the_command_does() -> None:
    from minnow.stages.quickstart import Config

    recipe = next(recipe for recipe in RECIPES if recipe.stem == "quickstart")
    assert load(recipe) == Config(), "write it again: minnow quickstart --print_config"


TRAINING = (
    "--training.device cpu --training.precision fp32 --training.compile off --training.steps 2"
    " --sequence_length 64 --training.batch_tokens 256 --training.micro_batch_tokens 128"
)
SHAPE = (
    "--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 2"
    " --model.num_attention_heads 2 --model.num_key_value_heads 1 --model.head_dim 16"
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tokenizer, texts and conversations, a hundred of each."""
    folder = tmp_path_factory.mktemp("data")
    texts = [f"Fish {i} swims in the pond. 第{i}条鱼在池塘里游。" for i in range(100)]
    turns = [
        [{"role": "user", "content": f"Who is number {i}?"}, {"role": "assistant", "content": f"Fish {i}."}]
        for i in range(100)
    ]
    _write(folder / "texts.jsonl", [{"text": text} for text in texts])
    _write(folder / "conversations.jsonl", [{"messages": messages} for messages in turns])
    train_tokenizer(texts, 320).save_pretrained(folder / "tokenizer")
    return folder


@pytest.mark.parametrize("size", SIZES)
def test_trains_at_a_tiny_setting(size: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, cache = RECIPES[0].parent, f"--data.cache_dir {tmp_path}/cache"
    pretrain = f"--config {folder}/pretrain-{size}.yaml --tokenizer {data}/tokenizer {TRAINING} {SHAPE} {cache}"
    assert cli.main(["pretrain", *pretrain.split(), "--data.paths", f"{data}/texts.jsonl"]) == 0
    sft = f"--config {folder}/sft-{size}.yaml {TRAINING} {cache} --data.paths {data}/conversations.jsonl"
    assert cli.main(["sft", *sft.split()]) == 0
    lines = (tmp_path / f"runs/sft-{size}/metrics.jsonl").read_text().splitlines()
    assert any("loss" in json.loads(line) for line in lines)
    assert (tmp_path / f"runs/sft-{size}/model/model.safetensors").exists()


def test_a_context_is_lengthened_at_a_tiny_setting(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    folder, words = RECIPES[0].parent, f"--data.cache_dir {tmp_path}/cache --data.paths {data}/texts.jsonl".split()
    pretrain = f"--config {folder}/pretrain-64m.yaml --tokenizer {data}/tokenizer {TRAINING} {SHAPE}"
    assert cli.main(["pretrain", *pretrain.split(), *words]) == 0
    longer = f"--config {folder}/pretrain-64m-long.yaml {TRAINING.replace('_length 64', '_length 256')}"
    assert cli.main(["pretrain", *longer.split(), *words]) == 0
    content = json.loads((tmp_path / "runs/pretrain-64m-long/model/config.json").read_text())
    assert (content["max_position_embeddings"], content["rope_parameters"]["factor"]) == (256, 4.0)


@pytest.fixture
def pond(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with a small pond and a tiny model `start`."""
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 2048}
    tokenizer = Tokenizer.from_pretrained(data / "tokenizer")
    save_pretrained(CausalLM(ModelConfig(vocab_size=320, **shape, **heads)), tmp_path / "start", tokenizer)
    write_pond("pond", World.generate(0, 12, 4), mentions=1, conversation_count=80, pair_count=80)
    return tmp_path


PONDS = ("lora", "sft-reasoning", "sft-forgetful", "sft-unsure", "sft-calculator", "dpo", "reward")


LONG = re.sub(r"tokens \d+|length \d+", lambda setting: setting[0].split()[0] + " 2048", TRAINING)


def train(name: str, start: str = "start") -> None:
    recipe = RECIPES[0].parent / f"{name}.yaml"
    words = f"--config {recipe} --init_from {start} --data.cache_dir cache {LONG}"
    assert cli.main([name.partition("-")[0], *words.split()]) == 0


@pytest.mark.parametrize("name", PONDS)
def test_the_ponds_recipes_train_at_a_tiny_setting(name: str, pond: Path) -> None:
    train(f"{name}-pond")
    assert len((pond / f"runs/{name}-pond/metrics.jsonl").read_text().splitlines()) >= 2


def test_the_ponds_tools_are_taught_at_a_tiny_setting(pond: Path) -> None:
    """From a tokenizer that has read them, as the recipes say."""
    texts = "[pond/pretrain.jsonl, pond/sft.jsonl, pond/tools.jsonl]"
    words = ["--data", texts, "--vocab_size", "400", "--out", "runs/tools-tokenizer"]
    assert cli.main(["tokenizer", "train", *words]) == 0
    recipe = f"--config {RECIPES[0].parent}/pretrain-tools-pond.yaml --data.cache_dir cache {LONG} {SHAPE}"
    assert cli.main(["pretrain", *recipe.split()]) == 0
    train("sft-tools-pond", start="runs/pretrain-tools-pond")
    assert (pond / "runs/sft-tools-pond/model/model.safetensors").exists()


def test_the_ponds_pictures_are_learnt_at_a_tiny_setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_pond("pond", World.generate(0, 4, 2), mentions=1, conversation_count=4, pair_count=4, pictures=20)
    words = ["--data", "[pond/picture_texts.jsonl]", "--vocab_size", "400", "--out", "runs/vision-tokenizer"]
    assert cli.main(["tokenizer", "train", *words]) == 0
    settings = f"--data.cache_dir cache {TRAINING.replace('_length 64', '_length 256')}"
    pretrain = f"--config {RECIPES[0].parent}/pretrain-vision-pond.yaml {settings} {SHAPE}"
    assert cli.main(["pretrain", *pretrain.split()]) == 0
    captions = f"--config {RECIPES[0].parent}/vlm-pond-captions.yaml {settings}"
    small = " --tower.hidden_size 16 --tower.intermediate_size 32"
    assert cli.main(["vlm", *f"{captions}{small}".split()]) == 0
    assert cli.main(["vlm", *f"--config {RECIPES[0].parent}/vlm-pond.yaml {settings}".split()]) == 0
    assert cli.main(["eval", "runs/vlm-pond", "--tasks", "pictures", "--pond", "pond", "--max_rows", "8"]) == 0


def test_both_steps_of_eyes_run_at_a_tiny_setting(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """SigLIP's tower and MiniMind-V's rows, both small."""
    monkeypatch.chdir(tmp_path)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256}
    tokenizer = Tokenizer.from_pretrained(data / "tokenizer")
    save_pretrained(CausalLM(ModelConfig(vocab_size=320, **shape, **heads)), tmp_path / "start", tokenizer)
    siglip = {"image_size": 32, "patch_size": 16, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**siglip, intermediate_size=24)).save_pretrained(
        "siglip"
    )
    shown = itertools.islice(scenes(0, "training"), 40)
    asked = [{"role": "user", "content": "<image>\nFish?"}, {"role": "assistant", "content": "Fish."}]
    rows = [{"conversations": json.dumps(asked), "image_bytes": base64.b64encode(draw(s)).decode()} for s in shown]
    _write(Path("rows.jsonl"), rows)
    settings = f"--data.cache_dir cache --data.paths rows.jsonl {TRAINING}"
    first = f"--config {RECIPES[0].parent}/vlm-64m.yaml --init_from start --siglip siglip {settings}"
    assert cli.main(["vlm", *first.split()]) == 0
    assert cli.main(["vlm", *f"--config {RECIPES[0].parent}/vlm-64m-language.yaml {settings}".split()]) == 0
    assert Path("runs/vlm-64m-language/model/preprocessor_config.json").exists()


@pytest.mark.parametrize(
    ("name", "command"),
    [
        ("sums-pond", "grpo"),
        ("sums-pond", "ppo"),
        ("sums-pond", "spo"),
        ("preference-pond", "ppo"),
        ("calculator-pond", "grpo"),
        ("brief", "grpo"),
    ],
)
def test_recipes_practise_at_a_tiny_setting(name: str, command: str, pond: Path) -> None:
    if name == "preference-pond":
        train("reward-pond")
    for conversations in ("practise.jsonl", "held_out.jsonl"):
        Path(conversations).symlink_to("pond/sft.jsonl")
    words = f"--config {RECIPES[0].parent}/rl-{name}.yaml --init_from start --phases 1 --watch.patience 0"
    words += " --rollout.prompts 4 --rollout.max_tokens 4 --training.device cpu --training.precision fp32"
    words += " --sequence_length 2048 --training.validate_every 0"
    words += " --algorithm.critic.warmup_phases 0" if command == "ppo" else ""
    assert cli.main([command, *words.split()]) == 0
    lines = (pond / f"runs/rl-{name}/metrics.jsonl").read_text().splitlines()
    assert any("held_out/reward" in json.loads(line) for line in lines)


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
