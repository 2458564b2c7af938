"""Muon on sliced parameters (FSDP2): each process owns some whole matrices for the length of an iteration."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def on_whole_matrices(function: Callable[[Tensor], Tensor], slices_BrN: Tensor, parameter: DTensor) -> Tensor:
    """Apply `function` [B, M, N] -> [B, M, N] to B matrices of which each process holds some rows; return those rows.

    slices_BrN: this process's rows of B matrices, all shaped and sliced like `parameter`. Process p gets the other
    rows of matrices p, p + P, p + 2P ... of P processes, works on these alone and sends the rows back: every matrix
    is orthogonalised once, and travels once each way.
    """
    assert parameter.ndim == 2
    (dim,) = [i for i, placement in enumerate(parameter.placements) if placement.is_shard()]
    group = parameter.device_mesh.get_group(dim)
    me, processes = dist.get_rank(group), dist.get_world_size(group)
    (M, N), B = parameter.shape, slices_BrN.shape[0]
    most = -(-M // processes)
    rows = [max(0, min(most, M - most * p)) for p in range(processes)]
    owned = [len(range(p, B, processes)) for p in range(processes)]

    to_owners = torch.cat([slices_BrN[p::processes].flatten() for p in range(processes)])
    sent, received = [k * rows[me] * N for k in owned], [owned[me] * r * N for r in rows]
    whole = _exchange(to_owners, sent, received, group)
    parts = [part.view(owned[me], r, N) for part, r in zip(whole.split(received), rows, strict=True)]
    if owned[me]:
        result_kMN = function(torch.cat(parts, dim=1)).to(slices_BrN.dtype)
        parts = list(result_kMN.split(rows, dim=1))
    back = _exchange(torch.cat([part.flatten() for part in parts]), received, sent, group)
    result_BrN = torch.empty_like(slices_BrN)
    for p, part in enumerate(back.split(sent)):
        result_BrN[p::processes] = part.view(owned[p], rows[me], N)
    return result_BrN


def _exchange(values: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = values.new_empty(sum(received))
    dist.all_to_all_single(out, values, received, sent, group=group)
    return out
