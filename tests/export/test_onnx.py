"""The ONNX graph in onnxruntime: logits, the cache in any pieces, padding, greedy continuation, 8-bit weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from export_models import ARCHITECTURES, EXPERTS, mean_divergence, reference_greedy, reference_logits, tiny_model
from onnx_model import OnnxModel

from minnow import cli
from minnow.export import onnx_file
from minnow.export.onnx_decoder import OnnxDecoder
from minnow.export.onnx_file import quantise, write_onnx
from minnow.model.pretrained import load_pretrained

IDS = [0, 5, 300, 7, 7, 120, 33, 250, 1, 90, 60]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    # A base of its own: nothing that another test computed can stand in for what the export leaves behind. The first
    # layer is dense and the second has experts, so that one export (seconds) shows both.
    experts = EXPERTS["qwen3 moe, first layer dense"]
    folder = tiny_model(tmp_path_factory.mktemp("onnx"), rope_theta=12_345.0, **experts)
    assert cli.main(["export", str(folder), "--to", "onnx"]) == 0
    return folder, folder / "onnx" / "model.onnx"


def test_logits(exported: tuple[Path, Path]) -> None:
    folder, path = exported
    onnx.checker.check_model(path)
    for length in (1, 2, len(IDS)):
        np.testing.assert_allclose(
            OnnxModel(path).logits(IDS[:length]), reference_logits(folder, IDS[:length]), atol=1e-4
        )


def test_names_are_those_of_transformers_js(exported: tuple[Path, Path]) -> None:
    graph = onnx.load(exported[1]).graph
    caches = [f"{layer}.{part}" for layer in range(2) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", "position_ids", *(f"past_key_values.{name}" for name in caches)]
    assert [value.name for value in graph.input] == inputs
    assert [value.name for value in graph.output] == ["logits", *(f"present.{name}" for name in caches)]
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    batch, new = shapes["input_ids"]
    assert isinstance(batch, str)
    assert isinstance(new, str)
    cached = shapes["past_key_values.1.value"]
    assert cached[0] == batch
    assert (cached[1], cached[3]) == (2, 16)
    assert isinstance(cached[2], str)


def test_the_cache_in_pieces(exported: tuple[Path, Path]) -> None:
    folder, path = exported
    model, found, at = OnnxModel(path), [], 0
    for size in (4, 1, 1, 3, 2):
        found.append(model.step(np.array([IDS[at : at + size]]))[0])
        at += size
    np.testing.assert_allclose(np.concatenate(found), reference_logits(folder, IDS), atol=1e-4)


def test_a_batch_with_padding(exported: tuple[Path, Path]) -> None:
    """Padding to the left changes nothing for the others, in the first step and behind it."""
    folder, path = exported
    ids = np.array([IDS[:8], [0, 0, 0, *IDS[:5]]])
    mask = np.array([[1] * 8, [0] * 3 + [1] * 5])
    model = OnnxModel(path)
    first = model.step(ids, mask)
    second = model.step(np.array([[IDS[8]], [IDS[5]]]))
    assert np.isfinite(first).all()
    np.testing.assert_allclose(first[0], reference_logits(folder, IDS[:8]), atol=1e-4)
    np.testing.assert_allclose(first[1, 3:], reference_logits(folder, IDS[:5]), atol=1e-4)
    np.testing.assert_allclose(second[0], reference_logits(folder, IDS[:9])[-1:], atol=1e-4)
    np.testing.assert_allclose(second[1], reference_logits(folder, IDS[:6])[-1:], atol=1e-4)


def test_greedy(exported: tuple[Path, Path]) -> None:
    folder, path = exported
    assert OnnxModel(path).greedy(IDS, 12) == reference_greedy(folder, IDS, 12)


def test_int8_is_smaller_and_close(exported: tuple[Path, Path], tmp_path: Path) -> None:
    """Of a mixture too: onnxruntime stumbled over its routers, and `--type int8` ended in a traceback."""
    folder, path = exported
    small = tmp_path / "int8.onnx"
    quantise(path, small)
    matrices = {i.name: i.data_type for i in onnx.load(small).graph.initializer if len(i.dims) > 1}
    # A choice of experts that rounding turns round costs more than the bits of so small a matrix.
    assert matrices.pop("model.model.layers.1.mlp.gate.weight") == onnx.TensorProto.FLOAT
    assert set(matrices.values()) == {onnx.TensorProto.UINT8}
    assert small.stat().st_size < 0.7 * path.stat().st_size  # the graph itself weighs something here
    divergence = mean_divergence(reference_logits(folder, IDS), OnnxModel(small).logits(IDS))
    assert 0 < divergence < 0.02


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_of_a_fixed_graph_compute_what_the_mixture_does(name: str, tmp_path: Path) -> None:
    """What is traced for every kind of router, without the seconds of an export; in pieces, as the cache allows."""
    folder = tiny_model(tmp_path, **EXPERTS[name])
    decoder, found, at = OnnxDecoder(load_pretrained(folder, dtype=torch.float32)).eval(), [], 0
    past = [(torch.zeros(1, 2, 0, 16), torch.zeros(1, 2, 0, 16)) for _ in range(2)]
    for size in (6, 5):
        ids, places = torch.tensor([IDS[at : at + size]]), torch.arange(at, at + size)[None]
        at += size
        with torch.no_grad():
            logits, past = decoder(ids, torch.ones(1, at, dtype=torch.int64), places, past)
        found.append(logits[0].numpy())
    np.testing.assert_allclose(np.concatenate(found), reference_logits(folder, IDS), atol=1e-4)


@pytest.mark.parametrize("kind", ["f32", "int8"])
def test_weights_beyond_onnx_s_limit_lie_beside_the_graph(
    kind: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both files come out of the hidden folder where they are written, and nothing else."""

    def export(decoder: OnnxDecoder, path: Path) -> None:
        path.write_text("graph")
        path.with_name(f"{path.name}.data").write_text("weights")

    def quantise(graph: Path, path: Path, *, external: bool) -> None:
        assert external
        assert graph.read_text() == "graph"
        path.write_text("small graph")
        path.with_name(f"{path.name}.data").write_text("small weights")

    monkeypatch.setattr(onnx_file, "_export", export)
    monkeypatch.setattr(onnx_file, "quantise", quantise)
    monkeypatch.setattr(onnx_file, "_external", lambda decoder: True)
    write_onnx(tiny_model(tmp_path), tmp_path / "out" / "x.onnx", kind)
    small = "small " if kind == "int8" else ""
    written = {file.name: file.read_text() for file in (tmp_path / "out").iterdir()}
    assert written == {"x.onnx": f"{small}graph", "x.onnx.data": f"{small}weights"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "qwen3"])
def test_every_architecture(name: str, tmp_path: Path) -> None:
    folder = tiny_model(tmp_path, **ARCHITECTURES[name])
    write_onnx(folder, tmp_path / "model.onnx")
    np.testing.assert_allclose(OnnxModel(tmp_path / "model.onnx").logits(IDS), reference_logits(folder, IDS), atol=1e-4)
    assert OnnxModel(tmp_path / "model.onnx").greedy(IDS, 12) == reference_greedy(folder, IDS, 12)


@pytest.mark.slow
def test_int8_by_the_command(tmp_path: Path) -> None:
    folder = tiny_model(tmp_path)
    assert cli.main(["export", str(folder), "--to", "onnx", "--type", "int8"]) == 0
    assert sorted(file.name for file in (folder / "onnx").iterdir()) == ["model_int8.onnx"]
    model = OnnxModel(folder / "onnx" / "model_int8.onnx")
    assert mean_divergence(reference_logits(folder, IDS), model.logits(IDS)) < 0.02
