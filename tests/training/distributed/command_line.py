"""A small world for whole runs from the command line, and whether two of them trained the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

from safetensors.torch import load_file

from minnow import cli
from minnow.tokenizer.train import train_tokenizer

from .processes import ROOT

SETTINGS = {
    "sequence_length": 64,
    "steps": 6,
    "batch_tokens": 512,
    "micro_batch_tokens": 128,
    "device": "cpu",
    "precision": "fp32",
    "compile": "off",
    "validation_tokens": 256,
    "optim.optimizer": "adamw",
    "optim.matrix_lr": 0.0003,
}
SHAPE = {
    "model.hidden_size": 32,
    "model.intermediate_size": 48,
    "model.num_hidden_layers": 2,
    "model.num_attention_heads": 2,
    "model.num_key_value_heads": 1,
    "model.head_dim": 16,
}


def write_world(folder: Path) -> None:
    """A pond and a tokenizer."""
    sizes = {"creatures": 30, "held_out": 6, "mentions": 8, "conversations": 60}
    options = [word for name, value in sizes.items() for word in (f"--{name}", str(value))]
    assert cli.main(["data", "pond", "--out", str(folder / "pond"), *options]) == 0
    texts = [row["text"] for row in map(json.loads, (folder / "pond" / "pretrain.jsonl").open())]
    train_tokenizer(texts[:200], 500).save_pretrained(folder / "tokenizer")


def words(folder: Path, stage: str, run: Path, **settings: object) -> list[str]:
    """The command line of a tiny run."""
    own = {"init_from": folder / "pretrain-1"}
    if stage == "pretrain":
        own = {"tokenizer": folder / "tokenizer", **SHAPE}
    data = {"data.paths": folder / "pond" / f"{stage}.jsonl", "data.cache_dir": folder / "cache", "run": run}
    pairs = {**SETTINGS, **own, **data, **settings}.items()
    return [stage, *(word for key, value in pairs for word in (f"--{key}", str(value)))]


def environment() -> dict[str, str]:
    """For a process that runs this tree's minnow."""
    return os.environ | {"PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}


def losses(run: Path) -> list[float]:
    """Training and validation losses, in the order of the log."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [record.get("loss", record.get("validation_loss")) for record in map(json.loads, lines)]


def difference(left: Path, right: Path) -> float:
    """The greatest difference of two runs' final weights."""
    expected, got = (load_file(run / "model" / "model.safetensors") for run in (left, right))
    return max(float((weight - got[name]).abs().max()) for name, weight in expected.items())
