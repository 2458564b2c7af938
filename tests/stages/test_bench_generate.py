"""`minnow bench generate` on a tiny shape: both contestants run, and the file has the promised form."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from minnow import cli

SHAPE = (
    "--model.hidden_size 32 --model.intermediate_size 64 --model.num_hidden_layers 2 --model.num_attention_heads 2"
    " --model.num_key_value_heads 1 --model.head_dim 16 --model.vocab_size 320"
)
SPEED = "--device cpu --precision fp32 --compile false --rounds 1 --prompt_tokens 5"
TINY = [*SHAPE.split(), *SPEED.split()]


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "figures.json"
    sizes = ["--streams", "[1, 3]", "--new_tokens", "[6, 4]"]
    assert cli.main(["bench", "generate", *TINY, *sizes, "--json", str(file)]) == 0
    figures = json.loads(file.read_text(encoding="utf-8"))
    for contestant in ("minnow", "transformers"):
        assert set(figures[contestant]) == {"1", "3"}
        assert all(speed > 0 for speed in figures[contestant].values())
    assert figures["bandwidth_share"] > 0
    assert "of the bound" in capsys.readouterr().out


def test_lengths_must_match(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["bench", "generate", *TINY, "--streams", "[1]"]) == 2
    assert "2 numbers for 1 --streams" in capsys.readouterr().err
