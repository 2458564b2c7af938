"""B1: with one expert a token and weights made to sum to 1, the router counts for nothing.

llama.cpp's Qwen3-MoE always makes them sum to 1, so such a model must not be written as one.
"""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest
from export_models import EXPERTS, tiny_model

from minnow.export.gguf_file import write_gguf


@pytest.mark.parametrize(
    ("name", "arch", "norm"),
    [("qwen3 moe", "qwen3moe", True), ("qwen3 moe, one expert a token", "glm4moe", False)],
)
def test_the_weight_of_the_only_expert_survives(name: str, arch: str, norm: bool, tmp_path: Path) -> None:
    write_gguf(tiny_model(tmp_path, **EXPERTS[name]), tmp_path / "x.gguf")
    header = gguf.GGUFReader(tmp_path / "x.gguf")
    assert header.fields["general.architecture"].contents() == arch
    assert header.fields[f"{arch}.expert_weights_norm"].contents() is norm
    shared = {t.name: t.data for t in header.tensors if "shexp" in t.name}
    assert bool(shared) == (arch == "glm4moe")
    assert all((data == 0).all() for data in shared.values())
