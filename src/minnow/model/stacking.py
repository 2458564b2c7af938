"""Experts are stacked in memory ([E, F, D] a matrix) and stored one by one, as transformers 4 and 5 both read them."""

from __future__ import annotations

import re

import torch
from torch import Tensor

_STACKED = re.compile(r"(.+\.mlp\.experts)\.(gate_proj|up_proj|down_proj)")
_SINGLE = re.compile(r"(.+\.mlp\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj)\.weight")


def unstack_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Name each expert's matrix on its own: `experts.gate_proj` [E, F, D] -> E of `experts.3.gate_proj.weight`."""
    single: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        found = _STACKED.fullmatch(name)
        if found is None:
            single[name] = tensor
        else:
            single |= {f"{found[1]}.{index}.{found[2]}.weight": matrix for index, matrix in enumerate(tensor.unbind())}
    return single


def stack_experts(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Undo `unstack_experts`. Experts of which some are missing stay as they are, for the reader to complain of.

    Also takes the fused form in which transformers 5 keeps experts in memory (`experts.gate_up_proj` [E, 2F, D]).
    """
    stacked: dict[str, Tensor] = {}
    singles: dict[str, dict[int, Tensor]] = {}
    for name, tensor in weights.items():
        found = _SINGLE.fullmatch(name)
        if found is not None:
            singles.setdefault(f"{found[1]}.{found[3]}", {})[int(found[2])] = tensor
        elif name.endswith(".mlp.experts.gate_up_proj"):
            gate, up = tensor.chunk(2, dim=1)
            base = name.removesuffix("gate_up_proj")
            stacked |= {f"{base}gate_proj": gate.contiguous(), f"{base}up_proj": up.contiguous()}
        else:
            stacked[name] = tensor
    for name, matrices in singles.items():
        ordered = [matrices[index] for index in sorted(matrices)]
        whole = sorted(matrices) == list(range(len(matrices))) and len({matrix.shape for matrix in ordered}) == 1
        if whole:
            stacked[name] = torch.stack(ordered)
        else:
            owner, kind = name.rsplit(".", 1)
            stacked |= {f"{owner}.{index}.{kind}.weight": matrix for index, matrix in matrices.items()}
    return stacked
