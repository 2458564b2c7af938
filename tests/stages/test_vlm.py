"""`minnow vlm`: what it starts from, what learns, what it refuses, and that a run can be continued."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file

from minnow.config import UserError, parse_config
from minnow.model.pretrained import load_pretrained
from minnow.model.vision_language import VisionLanguageModel
from minnow.stages import vlm
from minnow.tokenizer import Tokenizer
from minnow.tokenizer.template import chat_template, differences
from tests.training.seeing import TOWER, asked, mixed, picture, reading_model, seeing_model, write_rows

SMALL = {"sequence_length": 64, "training.batch_tokens": 256, "training.micro_batch_tokens": 128, "training.steps": 4}
SMALL |= {"training.device": "cpu", "training.precision": "fp32", "training.compile": "off"}
SMALL |= {
    "training.validate_every": 2,
    "training.save_every": 2,
    "schedule.warmup_steps": 0,
    "data.validation_fraction": 0.2,
}
NEW_TOWER = {f"tower.{key}": value for key, value in TOWER.items()}


@pytest.fixture(autouse=True)
def data(tmp_path: Path) -> None:
    """Conversations with none, one and two pictures; a test may write others."""
    write_rows(tmp_path / "rows.jsonl", mixed(24))


def train(run: Path, init_from: Path, **settings: object) -> Path:
    data = {"data.paths": run.parent / "rows.jsonl", "data.cache_dir": run.parent / "cache"}
    every = SMALL | data | {"run": run, "init_from": init_from} | settings
    words = [word for key, value in every.items() for word in (f"--{key}", str(value))]
    vlm.run(parse_config(vlm.Config, words, program="minnow vlm"))
    return run / "model"


def changed(before: Path | dict[str, torch.Tensor], after: Path) -> set[str]:
    """The parts of the model that are not what they were."""
    old = before if isinstance(before, dict) else load_pretrained(before).state_dict()
    new = load_pretrained(after).state_dict()
    return {name.split(".")[0] for name, tensor in old.items() if not torch.equal(tensor, new[name])}


def test_a_language_model_gets_a_new_tower_and_everything_learns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = reading_model(tmp_path / "start")
    folder = train(tmp_path / "run", start, **NEW_TOWER)
    model, tokenizer = load_pretrained(folder), Tokenizer.from_pretrained(folder)
    assert isinstance(model, VisionLanguageModel)
    assert model.image_token_id == tokenizer.image_id
    assert tokenizer.image_format == model.image_format
    assert changed(start, folder) == {"model"}
    recorded = (tmp_path / "run" / "config.yaml").read_text()
    assert "train: all" in recorded
    assert "image_size: 8" in recorded
    said = " ".join(capsys.readouterr().err.split())
    total = sum(parameter.numel() for parameter in model.parameters())
    assert f"{total:,} parameters, of which" in said
    parts = [sum(p.numel() for p in part.parameters()) for part in (model.model, *model.vision_modules)]
    assert "(language model {:,}, tower {:,}, projector {:,})".format(*parts) in said
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    validations = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert validations[-1] < validations[0]


def test_transformers_reads_what_was_trained_as_its_card_says(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = train(tmp_path / "run", reading_model(tmp_path / "start"), **NEW_TOWER)
    theirs = transformers.AutoModelForImageTextToText.from_pretrained(folder)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    card = (folder / "README.md").read_text()
    assert "pipeline_tag: image-text-to-text" in card
    assert "vision-language model (LlavaForConditionalGeneration)" in card
    assert "pictures of 8 x 8 pixels" in card
    assert "a picture takes 4 tokens" in card
    assert "minnow export" not in card
    code = card.partition("```python\n")[2].partition("```")[0]
    (tmp_path / "picture.png").write_bytes(picture((220, 30, 30)))
    code = code.replace('"."', repr(str(folder))).replace("picture.png", str(tmp_path / "picture.png"))
    exec(code, {})  # what the card says is done
    assert "What is this?" in " ".join(capsys.readouterr().out.split())


def siglip(folder: Path) -> Path:
    """A SigLIP checkpoint of transformers'."""
    torch.manual_seed(0)
    transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**TOWER)).save_pretrained(folder)
    return folder


def test_siglips_tower_is_taken_over_and_the_projector_learns_first_then_the_language_model(tmp_path: Path) -> None:
    start = reading_model(tmp_path / "start")
    first = train(tmp_path / "first", start, siglip=siglip(tmp_path / "siglip"))
    tower = {
        f"vision_tower.vision_model.{name.removeprefix('vision_model.')}": tensor
        for name, tensor in load_file(tmp_path / "siglip" / "model.safetensors").items()
        if ".head." not in f".{name}"
    }
    assert len(tower) > 20
    assert changed(tower | load_pretrained(start).state_dict(), first) == set()
    second = train(tmp_path / "second", first)
    assert changed(first, second) == {"model", "multi_modal_projector"}
    assert "train: language" in (tmp_path / "second" / "config.yaml").read_text()
    third = train(tmp_path / "third", second, train="all")
    assert changed(second, third) == {"model", "multi_modal_projector", "vision_tower"}
    assert changed(third, train(tmp_path / "last", third, train="projector")) == {"multi_modal_projector"}


def broken_off(run: Path) -> Path:
    """Leave what was there after 2 updates of 4; the final model is moved away."""
    shutil.rmtree(run / "checkpoints" / "step-00000004")
    return (run / "model").rename(run.parent / f"{run.name}-model")


@pytest.mark.parametrize("train_what", ["projector", "language", "all"])
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(
    tmp_path: Path, train_what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    start, run = seeing_model(tmp_path / "start"), tmp_path / "run"
    train(run, start, train=train_what)
    before = (run / "metrics.jsonl").read_text().splitlines()
    whole = broken_off(run)
    assert not changed(whole, train(run, start, train=train_what))
    assert "from step 2" in " ".join(capsys.readouterr().err.split())  # the console wraps its lines
    after = (run / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line).get("loss") for line in before] == [json.loads(line).get("loss") for line in after]


def test_a_frozen_part_that_has_changed_stops_a_run_that_goes_on(tmp_path: Path) -> None:
    start = seeing_model(tmp_path / "start")
    train(tmp_path / "run", start, train="projector")
    broken_off(tmp_path / "run")
    seeing_model(tmp_path / "start", seed=5)
    with pytest.raises(UserError, match="other weights of its base"):
        train(tmp_path / "run", start, train="projector")


@pytest.mark.parametrize(
    ("sees", "settings", "said"),
    [
        (False, {"siglip": "there", "tower.image_size": 32}, "leave one of them out"),
        (True, {"siglip": "there"}, "--siglip: .*start has a vision tower already"),
        (True, {"tower.image_size": 32}, "--tower: .*start has a vision tower already"),
        (False, {"train": "projector"}, "leaves the new tower as it was drawn"),
        (False, {"train": "language"}, "leaves the new tower as it was drawn"),
        (False, {"lora.rank": 4}, "without the projector"),
        (False, {"tower.image_size": 64, "tower.patch_size": 8}, "a picture takes 64 tokens, and a row has 64"),
        (False, {"siglip": "nowhere/at all"}, "nowhere/at all: no such folder"),
        (False, {"tower.patch_size": 5}, "must divide"),
        (False, {"sequence_length": 128}, "128"),
    ],
)
def test_what_cannot_be_is_refused_before_any_work(
    tmp_path: Path, sees: bool, settings: dict[str, object], said: str
) -> None:
    start = (seeing_model if sees else reading_model)(tmp_path / "start")
    with pytest.raises(UserError, match=said):
        train(tmp_path / "run", start, **settings)
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_without_image_tokens_is_refused(tmp_path: Path) -> None:
    start = reading_model(tmp_path / "start")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        file = start / name
        file.write_text(file.read_text().replace("<|image_pad|>", "<|nothing|>"))
    with pytest.raises(UserError, match=r"lack <\|image_pad\|>"):
        train(tmp_path / "run", start)


def test_a_template_that_knows_only_texts_is_replaced_by_one_that_shows_pictures(tmp_path: Path) -> None:
    start = reading_model(tmp_path / "start")
    template = chat_template()
    begin, end = template.index("{%- if message.content is string %}"), template.index("{{- '<|im_end|>\\n' }}")
    of_texts = template[:begin] + "{{- message.content }}" + template[end:]
    assert differences(of_texts) == []
    (start / "chat_template.jinja").write_text(of_texts)
    folder = train(tmp_path / "run", start, **NEW_TOWER)
    assert (folder / "chat_template.jinja").read_text() == template


def test_data_without_a_picture_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "rows.jsonl", [asked(question=f"{number}?") for number in range(12)])
    with pytest.raises(UserError, match="not one picture"):
        train(tmp_path / "run", reading_model(tmp_path / "start"), **NEW_TOWER)
    assert not (tmp_path / "run").exists()


def test_many_rows_without_a_picture_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(vlm, "ROWS_LOOKED_AT", 1)
    texts = [asked(question=f"{number}?") for number in range(40)]
    write_rows(tmp_path / "rows.jsonl", [*texts, *mixed(3)[2:]])
    train(tmp_path / "run", reading_model(tmp_path / "start"), **NEW_TOWER)
    assert "there is no picture in the first 1 rows" in " ".join(capsys.readouterr().err.split())
