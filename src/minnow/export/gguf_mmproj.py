"""Tower and projector of a model as llama.cpp wants them: a GGUF file of their own, its `--mmproj`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Quantization
from torch import Tensor

from minnow.config import UserError
from minnow.disk import atomic_write
from minnow.model.vision_language import VisionLanguageModel
from minnow.tokenizer.images import MEAN, STD

_PROJECTOR = {"linear_1": "mm.0", "linear_2": "mm.2"}


def write_mmproj(model: VisionLanguageModel, path: Path, name: str, *, f32: bool = False) -> None:
    """Write tower and projector of `model` to the file `path`, whole or not at all; matrices in f16, or in `f32`.

    UserError for a tower that llama.cpp would compute otherwise.
    """
    vision = model.vision
    if vision.hidden_size == vision.intermediate_size:
        # By these sizes it tells files of an old converter, which had the MLP's two matrices the wrong way round.
        raise UserError(
            f"tower and MLP are both {vision.hidden_size} wide, and llama.cpp would take its matrices for swapped: "
            "give a new tower another intermediate_size"
        )
    with atomic_write(path) as temporary:
        writer = gguf.GGUFWriter(temporary, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.MMPROJ])
        writer.add_type("mmproj")
        writer.add_name(name)
        writer.add_file_type(gguf.LlamaFileType.ALL_F32 if f32 else gguf.LlamaFileType.MOSTLY_F16)
        writer.add_clip_has_vision_encoder(True)
        writer.add_clip_projector_type("mlp")
        writer.add_vision_projection_dim(model.config.hidden_size)
        writer.add_vision_image_size(vision.image_size)
        writer.add_vision_patch_size(vision.patch_size)
        writer.add_vision_embedding_length(vision.hidden_size)
        writer.add_vision_feed_forward_length(vision.intermediate_size)
        # It goes through all layers but the last, as LLaVA does: so that one is written though nothing runs it.
        writer.add_vision_block_count(vision.num_used_layers + 1)
        writer.add_vision_head_count(vision.num_attention_heads)
        writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
        writer.add_vision_use_gelu(True)
        writer.add_vision_image_mean([MEAN] * 3)
        writer.add_vision_image_std([STD] * 3)
        for tensor_name, tensor in _tensors(model):
            is_matrix = tensor.ndim > 1 and tensor_name != "v.position_embd.weight"
            kind = Quantization.F16 if is_matrix and not f32 else Quantization.F32
            stored = tensor.detach().to("cpu", torch.float32).numpy()
            with np.errstate(over="ignore"):  # infinities are looked for
                data = stored.astype(np.float16) if kind == Quantization.F16 else stored
            if not np.isfinite(data).all():
                raise UserError(f"{tensor_name} has a weight beyond 65504, the largest f16: take --type f32")
            writer.add_tensor(tensor_name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def _tensors(model: VisionLanguageModel) -> Iterator[tuple[str, Tensor]]:
    """(llama.cpp's name, tensor). Without the norm behind the layers, which it would run: transformers does not."""
    layers = model.vision.num_used_layers + 1
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, layers)
    for name, tensor in model.vision_tower.state_dict().items():
        stem, _, kind = name.rpartition(".")
        layer = name.split(".layers.")[-1].split(".")[0]
        if stem.endswith("post_layernorm") or (layer.isdigit() and int(layer) >= layers):
            continue
        renamed = names.get_name(f"vision_tower.{stem}")
        assert renamed is not None, name
        yield f"{renamed}.{kind}", tensor
    for name, tensor in model.multi_modal_projector.state_dict().items():
        stem, _, kind = name.rpartition(".")
        yield f"{_PROJECTOR[stem]}.{kind}", tensor
