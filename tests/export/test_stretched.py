"""`minnow export --rope-scaling`: every format says and computes what the same model stretched in its folder does."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
import pytest
from export_models import reference_logits, small_tokenizer, tiny_model
from onnx_model import OnnxModel

from minnow import cli
from minnow.model.context import ContextConfig
from minnow.model.pretrained import load_pretrained, save_pretrained

YARN = ["--rope-scaling", "yarn", "--factor", "4"]
IDS = [0, 5, 300, 7, 7, 120, 33, 250, 1, 90, 60] * 3


def plain_and_stretched(folder: Path) -> tuple[Path, Path]:
    """A model of a context of 16 tokens, and itself with that of 64 in its config.json."""
    plain = tiny_model(folder, max_position_embeddings=16)
    model = load_pretrained(plain)
    model.config = ContextConfig(rope_scaling="yarn", factor=4).extend(model.config)
    save_pretrained(model, folder / "long" / plain.parent.name / "model", small_tokenizer())
    return plain, folder / "long" / plain.parent.name / "model"


def header(path: Path) -> dict[str, object]:
    return {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}


@pytest.mark.parametrize("to", ["gguf", "ollama"])
def test_gguf(to: str, tmp_path: Path) -> None:
    plain, stretched = plain_and_stretched(tmp_path)
    assert cli.main(["export", str(plain), "--to", to, *YARN]) == 0
    assert cli.main(["export", str(stretched), "--to", to]) == 0
    found = header(plain / "model-f16.gguf")
    assert found == header(stretched / "model-f16.gguf")
    assert found["qwen3.context_length"] == 64
    assert found["qwen3.rope.scaling.type"] == "yarn"
    assert found["qwen3.rope.scaling.factor"] == 4.0
    assert found["qwen3.rope.scaling.original_context_length"] == 16
    if to == "ollama":
        assert "PARAMETER num_ctx 64\n" in (plain / "Modelfile").read_text(encoding="utf-8")


def test_onnx(tmp_path: Path) -> None:
    plain, stretched = plain_and_stretched(tmp_path)
    assert cli.main(["export", str(plain), "--to", "onnx", *YARN]) == 0
    logits = OnnxModel(plain / "onnx" / "model.onnx").logits(IDS)
    np.testing.assert_allclose(logits, reference_logits(stretched, IDS), atol=1e-4)


@pytest.mark.parametrize("to", ["gguf", "ollama", "onnx"])
def test_twice_is_refused(to: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, stretched = plain_and_stretched(tmp_path)
    assert cli.main(["export", str(stretched), "--to", to, *YARN]) == 2
    assert "the model has rope_scaling yarn by 4 already" in capsys.readouterr().err
    assert not [file for file in stretched.rglob("*") if file.suffix in (".gguf", ".onnx") or file.name == "Modelfile"]


def test_a_folder_is_pushed_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tiny_model(tmp_path)
    assert cli.main(["export", str(plain), "--to", "hub", "somebody/fish", *YARN]) == 2
    assert "--to hub uploads the folder as it is" in capsys.readouterr().err
