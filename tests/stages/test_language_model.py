"""What pretraining and fine-tuning refuse, and what they keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from minnow.config import UserError
from minnow.data.prepare import DataConfig
from minnow.model.config import ModelConfig
from minnow.stages import pretrain
from minnow.tokenizer import train_tokenizer
from minnow.training.config import TrainingConfig

TEXTS = [f"The {colour} fish number {i} swims in the pond." for i in range(60) for colour in ("red", "blue")]


@pytest.fixture
def config(tmp_path: Path) -> pretrain.Config:
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": t}) + "\n" for t in TEXTS))
    train_tokenizer(TEXTS, 320).save_pretrained(tmp_path / "tokenizer")
    return pretrain.Config(
        run=str(tmp_path / "run"),
        tokenizer=str(tmp_path / "tokenizer"),
        data=DataConfig(paths=(str(tmp_path / "texts.jsonl"),), cache_dir=str(tmp_path / "cache")),
        model=ModelConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=1,
            num_key_value_heads=1,
            head_dim=16,
        ),
        sequence_length=64,
        training=TrainingConfig(steps=4, batch_tokens=256, device="cpu", validate_every=2),
    )


def test_the_run_folder_says_what_really_ran(config: pretrain.Config) -> None:
    pretrain.run(config)
    run = Path(config.run)
    text = (run / "config.yaml").read_text()
    assert "precision: fp32" in text or "precision: bf16" in text
    assert "vocab_size: 320" in text
    assert "max_position_embeddings: 64" in text, "no length that was never trained may be advertised (E8)"
    assert {"metrics.jsonl", "checkpoints", "model", "report.html"} <= {path.name for path in run.iterdir()}
    saved = {path.name for path in (run / "model").iterdir()}
    assert {"config.json", "model.safetensors", "tokenizer.json", "generation_config.json"} <= saved


def test_another_configuration_is_refused_by_key(config: pretrain.Config) -> None:
    pretrain.run(config)
    with pytest.raises(UserError, match=r"training\.clip_norm: 1\.0 there, 2\.0 now"):
        pretrain.run(replace(config, training=replace(config.training, clip_norm=2.0)))


def test_data_that_changed_under_a_run_is_refused(config: pretrain.Config) -> None:
    pretrain.run(config)
    run = Path(config.run)
    (run / "model" / "config.json").unlink()  # as if the run had been stopped
    with open(config.data.paths[0], "a") as file:
        file.write(json.dumps({"text": "a new document"}) + "\n")
    with pytest.raises(UserError, match="other data"):
        pretrain.run(config)


def test_overwrite_deletes_runs_only(config: pretrain.Config, tmp_path: Path) -> None:
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="is no run"):
        pretrain.run(replace(config, run=str(precious), overwrite=True))
    assert (precious / "thesis.txt").exists()
    pretrain.run(config)
    pretrain.run(replace(config, overwrite=True, training=replace(config.training, clip_norm=2.0)))


def test_batch_that_is_no_multiple_of_the_row(config: pretrain.Config) -> None:
    with pytest.raises(UserError, match=r"batch_tokens \(100\) must be a multiple of sequence_length \(64\)"):
        pretrain.run(replace(config, training=replace(config.training, batch_tokens=100)))
    assert not Path(config.run).exists(), "a mistake must not occupy the run folder"


def test_tokenizer_is_asked_for(config: pretrain.Config) -> None:
    with pytest.raises(UserError, match="minnow tokenizer train"):
        pretrain.run(replace(config, tokenizer=None))
