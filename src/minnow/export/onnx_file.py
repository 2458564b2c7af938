"""A model as an ONNX graph with its KV cache, and the same with 8-bit weights."""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from minnow.export.onnx_decoder import OnnxDecoder
from minnow.model.config import ModelConfig
from minnow.model.context import AS_TRAINED, ContextConfig
from minnow.model.pretrained import load_pretrained

OnnxType = Literal["f32", "int8"]
ONNX_TYPES: tuple[OnnxType, ...] = get_args(OnnxType)
"""f32: as in minnow. int8: matrices but the routers' as 8-bit integers with one scale each, inputs quantised as they
come."""

_OPSET = 18


def write_onnx(folder: Path, path: Path, type: OnnxType = "f32", *, context: ContextConfig = AS_TRAINED) -> None:
    """Write the model in `folder` to `path`. Batch, new tokens and cached tokens may be any number.

    context: how far to stretch the model's. A graph beyond ONNX's limit of 2 GB keeps its weights in `path` + ".data".
    """
    model = load_pretrained(folder, dtype=torch.float32)
    model.config = context.extend(model.config)
    decoder = OnnxDecoder(model).eval()
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as temporary:
        graph = Path(temporary) / path.name
        _export(decoder, graph)
        if type == "int8":
            small = Path(temporary) / "int8" / path.name
            small.parent.mkdir()
            quantise(graph, small, external=_external(decoder))
            graph = small
        for file in graph.parent.iterdir():  # the weights' file first, if there is one: the graph names it
            if file.is_file() and file != graph:
                file.replace(path.parent / file.name)
        graph.replace(path)


def _export(decoder: OnnxDecoder, path: Path) -> None:
    batch, new, cached = torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC, torch.export.Dim.DYNAMIC
    layers = decoder.model.config.num_hidden_layers
    cache = [({0: batch, 2: cached}, {0: batch, 2: cached}) for _ in range(layers)]
    tokens = {0: batch, 1: new}
    shapes = {"input_ids": tokens, "attention_mask": {0: batch, 1: new}, "position_ids": tokens, "past": cache}
    with _quiet(), torch.no_grad():
        torch.onnx.export(
            decoder,
            _example(decoder.model.config),
            path,
            input_names=decoder.input_names(),
            output_names=decoder.output_names(),
            dynamic_shapes=shapes,
            opset_version=_OPSET,
            dynamo=True,
            verbose=False,
            external_data=_external(decoder),
        )


def _external(decoder: OnnxDecoder) -> bool:
    return sum(p.numel() * p.element_size() for p in decoder.parameters()) > 1_900_000_000


def _example(config: ModelConfig) -> tuple[Any, ...]:
    """Inputs of 2 rows, 3 new tokens and 5 cached ones: sizes of 0 and 1 would be taken for constants."""
    cache = torch.zeros(2, config.num_key_value_heads, 5, config.head_dim)
    ids = torch.zeros(2, 3, dtype=torch.int64)
    past = [(cache.clone(), cache.clone()) for _ in range(config.num_hidden_layers)]
    positions: Tensor = torch.arange(5, 8).expand(2, 3).clone()
    return ids, torch.ones(2, 8, dtype=torch.int64), positions, past


def quantise(graph: Path, path: Path, *, external: bool = False) -> None:
    """Write the graph in the file `graph` to `path` with 8-bit matrices, the embedding included; routers stay fp32.

    external: keep the weights in a file of their own, which graphs beyond 2 GB must.
    """
    import onnx
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(graph)
    # onnxruntime makes a router's Gemm a MatMul of this name. It turns the matrix round under its old name, and then
    # stumbles over what was said of its shape.
    routers = [f"{node.name}_MatMul" for node in model.graph.node if node.op_type == "Gemm"]
    weights = {weight.name for weight in model.graph.initializer}
    said = [value for value in model.graph.value_info if value.name not in weights]
    del model.graph.value_info[:]
    model.graph.value_info.extend(said)
    with _quiet():
        # Unsigned weights: a product of signed ones overflows 16 bits on CPUs without VNNI.
        quantize_dynamic(
            model,
            path,
            weight_type=QuantType.QUInt8,
            op_types_to_quantize=["MatMul", "Gather"],
            nodes_to_exclude=routers,
            use_external_data_format=external,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' reports of progress and of operators that other libraries could have added."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
