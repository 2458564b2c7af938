"""Weight-only quantisation in memory: of a model that is served, or frozen beside its adapters. Done only here.

Every matrix of the layers, experts too, becomes int8 with one scale a row (int8.py). The embedding, the head, the
norms, biases and routers stay: losses and log-probabilities take the head's matrix as it is, and of a large model it
is the smaller part. Files never hold these weights; quantised files are GGUF's and ONNX's (minnow export).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from minnow.model.int8 import to_int8
from minnow.model.lora import Quantization
from minnow.model.moe import Experts
from minnow.model.pretrained import load_pretrained
from minnow.model.transformer import CausalLM, Linear


@dataclass(frozen=True, kw_only=True)
class QuantizeConfig:
    """What the commands that can round a model share."""

    quantize: Quantization = "none"
    """int8 keeps each weight of the layers in one byte, the embedding and the head as they are: smaller, seldom faster.
    What it saves and costs is measured and printed."""


@torch.no_grad()
def quantize(model: CausalLM) -> None:
    """Freeze `model` and make the matrices of its layers int8, in place. Before adapters are put on it."""
    assert model.adapter is None
    model.requires_grad_(False)
    for module in model.model.modules():
        if isinstance(module, Linear):
            _round(module, "weight", "weight_scale")
        elif isinstance(module, Experts):
            for name in ("gate_proj", "up_proj", "down_proj"):
                _round(module, name, f"{name}_scale")


def _round(module: nn.Module, name: str, scale_name: str) -> None:
    weight, scale = to_int8(module.get_parameter(name))
    module.register_parameter(name, nn.Parameter(weight, requires_grad=False))
    module.register_parameter(scale_name, nn.Parameter(scale, requires_grad=False))


def is_quantized(model: nn.Module) -> bool:
    """Whether `quantize` was here."""
    return any(parameter.dtype == torch.int8 for parameter in model.parameters())


def load_quantized(
    folder: str | Path,
    quantization: Quantization,
    *,
    base: str | Path | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> CausalLM:
    """`load_pretrained`, and with "int8" the stored weights rounded once: not first to `dtype` and then again."""
    if quantization == "none":
        return load_pretrained(folder, base=base, dtype=dtype, device=device)
    model = load_pretrained(folder, base=base)
    quantize(model)
    dtype = dtype or model.compute_dtype
    for name, parameter in model.named_parameters():
        keeps = not parameter.is_floating_point() or name.endswith("_scale")
        parameter.data = parameter.data.to(device, parameter.dtype if keeps else dtype)
    model.to(device)  # the routers' biases, which stay fp32
    model.compute_dtype = dtype
    return model


def weight_bytes(model: nn.Module) -> int:
    """Memory of all parameters and buffers; tied ones count once."""
    return sum(t.numel() * t.element_size() for t in (*model.parameters(), *model.buffers()))


def unquantized_bytes(model: CausalLM) -> int:
    """What `weight_bytes` would be, had `model` not been quantised: all int8 weights in its compute dtype."""
    whole = sum(p.numel() for p in model.parameters() if p.dtype == torch.int8) * model.compute_dtype.itemsize
    kept = [p for name, p in model.named_parameters() if p.dtype != torch.int8 and not name.endswith("_scale")]
    return whole + sum(t.numel() * t.element_size() for t in (*kept, *model.buffers()))


def saving(model: CausalLM) -> str:
    """For a person: "int8: weights 4.9 MB against 14.6 MB"."""
    return f"int8: weights {weight_bytes(model) / 1e6:.1f} MB against {unquantized_bytes(model) / 1e6:.1f} MB"
