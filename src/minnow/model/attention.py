"""Causal attention: the seam through which training, the engine's cache and export plug into one model.

The model hands over queries, keys and values of one layer, normalised and turned; an `Attention` says who
sees whom. No mask is ever added to the scores, so nothing can overflow fp16: causal rows need none, and
packed documents are cut apart instead.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, cast

import torch
import torch.nn.functional as F
from torch import Tensor


class Attention(Protocol):
    """Attends within one layer: queries [B, T, H, d], keys and values [B, T, K, d] -> [B, T, H, d]."""

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Attend in layer number `layer`."""
        ...


def causal_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """Every query sees the keys up to its own place: softmax(q k / sqrt(d)) v, heads grouped (GQA)."""
    out_BHTd = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BTKd.transpose(1, 2),
        v_BTKd.transpose(1, 2),
        is_causal=True,
        enable_gqa=q_BTHd.shape[2] != k_BTKd.shape[2],
    )
    return out_BHTd.transpose(1, 2)


class CausalAttention:
    """Each row is one sequence from place 0."""

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Attend within rows."""
        return causal_attention(q_BTHd, k_BTKd, v_BTKd)


class PackedAttention:
    """Attention inside documents that stand one after another in the rows.

    cu_seqlens: int32 [pieces + 1] on the CPU, borders of the pieces in the flattened B * T tokens (a piece
    never crosses a row). Pieces of similar length are gathered into one group [n, L], padded at their end
    to the group's length. A real query never sees a key after it, so padding needs no mask, and no gradient
    comes from it. The plan of indices is made once and serves all layers. On CUDA in half precision, flash
    attention over variable lengths does the same without padding.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str = "cpu") -> None:
        borders = cu_seqlens.tolist()
        lengths = {end - start for start, end in pairwise(borders)}
        self.max_length = max(lengths)
        device = torch.device(device)
        # Pieces of one length all over: the tokens already stand in the only group.
        self._plan = None if len(lengths) == 1 else _make_plan(borders, device)
        self._varlen = _varlen_attention() if device.type == "cuda" else None
        self._borders = cu_seqlens.to(device, torch.int32)

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Attend within pieces."""
        q_NHd, k_NKd, v_NKd = q_BTHd.flatten(0, 1), k_BTKd.flatten(0, 1), v_BTKd.flatten(0, 1)
        if self._varlen is not None and q_NHd.dtype in (torch.float16, torch.bfloat16):
            out_NHd = self._varlen(
                q_NHd,
                k_NKd,
                v_NKd,
                self._borders,
                self._borders,
                self.max_length,
                self.max_length,
                window_size=(-1, 0),  # causal
                enable_gqa=q_NHd.shape[1] != k_NKd.shape[1],
            )
        elif self._plan is None:
            out_NHd = _attend_in_group(q_NHd, k_NKd, v_NKd, self.max_length)
        else:
            # Split once: the gradients of single slices would each be filled up with zeros to full size.
            slots = [_ToGroups.apply(x, self._plan).split(self._plan.sizes) for x in (q_NHd, k_NKd, v_NKd)]
            groups = zip(*slots, self._plan.lengths, strict=True)
            out_PHd = torch.cat([_attend_in_group(*group) for group in groups])
            out_NHd = _FromGroups.apply(out_PHd, self._plan)
        return out_NHd.view(q_BTHd.shape)


def _attend_in_group(q_PHd: Tensor, k_PKd: Tensor, v_PKd: Tensor, length: int) -> Tensor:
    """Causal attention among each `length` tokens: [n * length, H, d] in and out."""
    pieces = (x.unflatten(0, (-1, length)) for x in (q_PHd, k_PKd, v_PKd))
    return causal_attention(*pieces).flatten(0, 1)


@dataclass(frozen=True)
class _Plan:
    """Where N tokens stand when pieces are gathered into padded groups, one after another: P slots."""

    token_of_slot: Tensor  # padding reads its piece's last token: any finite value will do
    padding: Tensor  # the slots that hold padding
    slot_of_token: Tensor
    sizes: list[int]  # slots of each group
    lengths: list[int]  # padded length of its pieces


def _make_plan(borders: list[int], device: torch.device) -> _Plan:
    by_length: dict[int, list[tuple[int, int]]] = {}
    for start, end in pairwise(borders):
        by_length.setdefault(_padded_length(end - start), []).append((start, end))
    rows = []
    for padded, pieces in sorted(by_length.items()):
        starts_n1 = torch.tensor([start for start, _ in pieces]).unsqueeze(1)
        ends_n1 = torch.tensor([end for _, end in pieces]).unsqueeze(1)
        tokens_nL = starts_n1 + torch.arange(padded)
        rows.append((torch.minimum(tokens_nL, ends_n1 - 1).flatten(), (tokens_nL >= ends_n1).flatten()))
    token_of_slot = torch.cat([tokens for tokens, _ in rows])
    is_padding_P = torch.cat([is_padding for _, is_padding in rows])
    real_slots = (~is_padding_P).nonzero().squeeze(1)
    slot_of_token = torch.empty(borders[-1], dtype=torch.int64)
    slot_of_token[token_of_slot[real_slots]] = real_slots
    return _Plan(
        token_of_slot=token_of_slot.to(device),
        padding=is_padding_P.nonzero().squeeze(1).to(device),
        slot_of_token=slot_of_token.to(device),
        sizes=[len(tokens) for tokens, _ in rows],
        lengths=sorted(by_length),
    )


def _padded_length(length: int) -> int:
    """Round up to an eighth of the next power of two, at least to 16: few groups, little padding."""
    step = max(16, 1 << max(0, (length - 1).bit_length() - 3))
    return -(-length // step) * step


class _ToGroups(torch.autograd.Function):
    """[N, ...] -> [P, ...]. Padding has no gradient: the backward pass is a gather too, no scatter-add."""

    @staticmethod
    def forward(ctx: Any, x_N: Tensor, plan: _Plan) -> Tensor:
        ctx.plan = plan
        return x_N.index_select(0, plan.token_of_slot)

    @staticmethod
    def backward(ctx: Any, grad_P: Tensor) -> tuple[Tensor, None]:
        return grad_P.index_select(0, ctx.plan.slot_of_token), None


class _FromGroups(torch.autograd.Function):
    """[P, ...] -> [N, ...], leaving out the padding."""

    @staticmethod
    def forward(ctx: Any, x_P: Tensor, plan: _Plan) -> Tensor:
        ctx.plan = plan
        return x_P.index_select(0, plan.slot_of_token)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> tuple[Tensor, None]:
        grad_P = grad_N.index_select(0, ctx.plan.token_of_slot)
        return grad_P.index_fill_(0, ctx.plan.padding, 0), None


def _varlen_attention() -> Callable[..., Tensor] | None:
    """torch's variable-length flash attention, or None where this torch has none."""
    try:
        from torch.nn.attention import varlen
    except ImportError:
        return None
    return cast("Callable[..., Tensor]", varlen.varlen_attn)
