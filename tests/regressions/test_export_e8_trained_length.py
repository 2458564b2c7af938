"""E8: a model advertised 32,768 positions and was trained on a few hundred. Every export says the trained length."""

from __future__ import annotations

from pathlib import Path

import gguf
from export_models import tiny_model

from minnow.export.ollama import write_ollama


def test_exports_say_the_trained_length(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, max_position_embeddings=48)
    write_ollama(folder, tmp_path / "out", "f16")
    header = gguf.GGUFReader(tmp_path / "out" / "model-f16.gguf").fields
    assert header["qwen3.context_length"].contents() == 48
    assert "PARAMETER num_ctx 48\n" in (tmp_path / "out" / "Modelfile").read_text(encoding="utf-8")
