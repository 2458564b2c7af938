"""Causal attention: the seam through which training, the engine's cache and export plug into one model.

The model hands over queries, keys and values of one layer, normalised and turned; an `Attention` says who
sees whom. No mask is ever added to the scores, so nothing can overflow fp16: kernels know what causal means, and
packed documents are cut apart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from inspect import signature
from itertools import pairwise
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from minnow.cpu import cpu_multiplies_bf16_faster
from minnow.model.cpu_attention import cpu_causal_attention
from minnow.transfer import to_device

# torch prefers cuDNN's attention on Hopper and Blackwell, and that one takes a tenth of a second or more to plan for
# each shape it meets. Ours are new ones in nearly every step.
torch.backends.cuda.enable_cudnn_sdp(False)


class Attention(Protocol):
    """Attends within one layer: queries [B, T, H, d], keys and values [B, T, K, d] -> [B, T, H, d]."""

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Attend in layer number `layer`."""
        ...


def causal_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """Every query sees the keys up to its own place: softmax(q k / sqrt(d)) v, heads grouped (GQA)."""
    if q_BTHd.device.type == "cpu" and q_BTHd.dtype == torch.bfloat16 and _multiplies_bf16_fast():
        attended: Tensor = cpu_causal_attention(q_BTHd, k_BTKd, v_BTKd)
        return attended
    grouped = q_BTHd.shape[2] != k_BTKd.shape[2]
    if grouped and q_BTHd.is_cuda and not has_flash_attention(q_BTHd.device, q_BTHd.dtype):
        # Flash attention alone among torch's kernels takes grouped heads: without it all scores would be held at once.
        k_BTKd, v_BTKd = with_a_key_head_each(q_BTHd, k_BTKd, v_BTKd)
        grouped = False
    out_BHTd = F.scaled_dot_product_attention(
        q_BTHd.transpose(1, 2),
        k_BTKd.transpose(1, 2),
        v_BTKd.transpose(1, 2),
        is_causal=True,
        enable_gqa=grouped,
    )
    return out_BHTd.transpose(1, 2)


def with_a_key_head_each(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values [B, T, H, d], repeated for the queries that share them."""
    group = q_BTHd.shape[2] // k_BTKd.shape[2]
    return k_BTKd.repeat_interleave(group, dim=2), v_BTKd.repeat_interleave(group, dim=2)


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
    attention over variable lengths does the same without padding, and no plan is made.
    """

    def __init__(self, cu_seqlens: Tensor, device: torch.device | str = "cpu") -> None:
        self._cu_seqlens = cu_seqlens
        self._device = torch.device(device)
        self._lengths = set(cu_seqlens.diff().tolist())
        self.max_length = max(self._lengths)

    @cached_property
    def _plan(self) -> _Plan | None:
        # Pieces of one length all over: the tokens already stand in the only group.
        return None if len(self._lengths) == 1 else _make_plan(self._cu_seqlens.tolist(), self._device)

    @cached_property
    def _borders(self) -> Tensor:
        return to_device(self._cu_seqlens.to(torch.int32), self._device)

    def __call__(self, layer: int, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
        """Attend within pieces."""
        q_NHd, k_NKd, v_NKd = q_BTHd.flatten(0, 1), k_BTKd.flatten(0, 1), v_BTKd.flatten(0, 1)
        flash = flash_attention(q_NHd.device, q_NHd.dtype, q_NHd.shape[-1])
        if flash is not None:
            borders, length = self._borders, self.max_length
            out_NHd = flash(q_NHd, k_NKd, v_NKd, borders, borders, length, length)
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
        token_of_slot=to_device(token_of_slot, device),
        padding=to_device(is_padding_P.nonzero().squeeze(1), device),
        slot_of_token=to_device(slot_of_token, device),
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


@cache
def _multiplies_bf16_fast() -> bool:
    """Where bf16 is emulated, or its instructions are slow, torch's attention is the faster one."""
    return cpu_multiplies_bf16_faster()


@cache
def has_flash_attention(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether its kernels, which are for Ampere and newer and for half precision, run here."""
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16):
        return False
    return torch.cuda.get_device_capability(device) >= (8, 0)


@cache
def flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> Callable[..., Tensor] | None:
    """torch's causal flash attention over sequences of different lengths, `varlen_attn`, or None where it cannot be.

    It takes (q [N, H, d], k and v [N, K, d], borders of the queries and of the keys, int32, longest of each). The size
    of a head is a multiple of 8; backward, the kernels of consumer cards end at 192.
    """
    if not has_flash_attention(device, dtype) or head_dim % 8 or head_dim > 192:
        return None
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    return causal(varlen_attn)


def causal(varlen_attn: Callable[..., Any]) -> Callable[..., Tensor]:
    """Bind what makes `varlen_attn` causal and lets key heads be fewer than query heads; each torch says it its own
    way: 2.10 has `is_causal`, 2.11 has `window_size` in its place, later ones ask for `enable_gqa` besides."""
    arguments = signature(varlen_attn).parameters
    bound: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in arguments else {"is_causal": True}
    if "enable_gqa" in arguments:
        bound["enable_gqa"] = True
    return partial(varlen_attn, **bound)
