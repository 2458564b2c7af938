"""A model as one GGUF file for llama.cpp and what is built on it (ollama, LM Studio, ...).

Written with the `gguf` library alone: no llama.cpp has to be there, and no converter that guesses the tokenizer.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from torch import Tensor

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.export.gguf_mmproj import write_mmproj
from minnow.export.gguf_shape import add_shape, gguf_architecture, gguf_tensors
from minnow.export.gguf_tokenizer import add_tokenizer
from minnow.export.template import model_name, without_thinking
from minnow.model.context import AS_TRAINED, ContextConfig
from minnow.model.pretrained import load_pretrained
from minnow.model.vision_language import VisionLanguageModel
from minnow.tokenizer.template import folder_template

GgufType = Literal["f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0"]
GGUF_TYPES: tuple[GgufType, ...] = get_args(GgufType)
"""Number formats of the matrices. q8_0: blocks of 32 8-bit integers with an f16 scale, 8.5 bits a weight; q5_1, q5_0,
q4_1, q4_0: 5 or 4 bits a weight with such a scale, and (_1) an f16 minimum, so 4.5 to 6 bits."""

_FILE_TYPES = {
    "f32": gguf.LlamaFileType.ALL_F32,
    "f16": gguf.LlamaFileType.MOSTLY_F16,
    "bf16": gguf.LlamaFileType.MOSTLY_BF16,
    "q8_0": gguf.LlamaFileType.MOSTLY_Q8_0,
    "q5_1": gguf.LlamaFileType.MOSTLY_Q5_1,
    "q5_0": gguf.LlamaFileType.MOSTLY_Q5_0,
    "q4_1": gguf.LlamaFileType.MOSTLY_Q4_1,
    "q4_0": gguf.LlamaFileType.MOSTLY_Q4_0,
}
_BLOCK = 32


@dataclass(frozen=True)
class GgufFile:
    """What was written."""

    path: Path
    bytes: int
    kept_f16: tuple[str, ...]
    """Matrices of a quantised file that stay f16, because their rows are no multiple of 32 wide."""
    note: str | None
    """What the user should know about the tokenizer."""
    mmproj: Path | None
    """The second file of a model that looks at pictures: llama.cpp's `--mmproj`."""


def write_gguf(
    folder: Path,
    path: Path,
    type: GgufType = "f16",
    *,
    thinking: bool = False,
    context: ContextConfig = AS_TRAINED,
) -> GgufFile:
    """Write the model in `folder` to the file `path`, whole or not at all; tower and projector: mmproj-NAME beside it.

    thinking: whether the chat template can open a think block; llama.cpp does so by default where it can.
    context: how far to stretch the model's. UserError for what llama.cpp cannot represent.
    """
    logging.getLogger("gguf").setLevel(logging.WARNING)  # it tells of every call
    model = load_pretrained(folder)
    model.config = context.extend(model.config)
    tensors = dict(gguf_tensors(model))
    types = {name: tensor_type(name, tensor, type) for name, tensor in tensors.items()}
    template = folder_template(folder)
    if template is not None and not thinking:
        template = without_thinking(template)
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf_architecture(model.config)])
        writer.add_name(model_name(folder))
        writer.add_file_type(_FILE_TYPES[type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        add_shape(writer, model.config)
        note = add_tokenizer(writer, folder, model.config.vocab_size, template)
        for name, tensor in tensors.items():
            shape = gguf.quant_shape_to_byte_shape(tuple(tensor.shape), types[name])
            writer.add_tensor_info(name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=types[name])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name, tensor in tensors.items():  # one in memory at a time
            writer.write_tensor_data(encode(name, tensor, types[name]))
        writer.close()
        mmproj = None
        if isinstance(model, VisionLanguageModel):  # in here: where they are refused, there is no half of the two files
            mmproj = path.with_name(f"mmproj-{path.name}")
            write_mmproj(model, mmproj, model_name(folder), f32=type == "f32")
    kept = [n for n in tensors if type.startswith("q") and types[n] == Quantization.F16]
    return GgufFile(path, path.stat().st_size, tuple(kept), note, mmproj)


def tensor_type(name: str, tensor: Tensor, type: GgufType) -> Quantization:
    """Number format of one tensor in a file of `type`.

    Vectors (norms, biases) and routers stay f32, as llama.cpp demands. Quantised files keep the embedding and the head
    at q8_0: they pay most for fewer bits, the embedding of a small model above all, which is its head too.
    """
    if tensor.dim() == 1 or name.endswith(".ffn_gate_inp.weight"):
        return Quantization.F32
    wanted = Quantization[type.upper()]
    if not type.startswith("q"):
        return wanted
    if tensor.shape[-1] % _BLOCK:
        return Quantization.F16
    return Quantization.Q8_0 if name in ("token_embd.weight", "output.weight") else wanted


def encode(name: str, tensor: Tensor, type: Quantization) -> np.ndarray:
    """The bytes of `tensor` in `type`. UserError for a weight that f16 cannot hold."""
    with np.errstate(over="ignore"):  # infinities are looked for below
        data = gguf.quantize(tensor.to("cpu", torch.float32).numpy(), type)
    if type == Quantization.F16 and not np.isfinite(data).all():
        raise UserError(f"{name} has a weight beyond 65504, the largest f16: take --type bf16")
    return data
