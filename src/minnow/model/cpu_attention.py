"""Causal attention in bf16 on a CPU, out of plain matrix products.

torch's flash attention for CPUs cuts its work into products too small for the bf16 units of a processor. Here many
heads are multiplied at once, some queries at a time, so that their scores stay in the caches: twice as fast or more at
the lengths of most documents, and no slower at any. As in flash attention (2205.14135) no score is kept for the
backward pass, which computes them again. They are rounded to bf16, where flash attention has them in float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

QUERIES = 128
"""Queries at a time: with fewer, less of the future is multiplied in vain; with more, the products are larger."""

SCORES = 2**21
"""Scores at a time, 4 MB."""


@torch.library.custom_op("minnow::cpu_causal_attention", mutates_args=())
def cpu_causal_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """Every query sees the keys up to its own place: softmax(q k / sqrt(d)) v, [B, T, H, d], heads grouped (GQA).

    One operation to whoever looks on: selective checkpointing keeps what it returns, and nothing of its inside.
    """
    scale = q_BTHd.shape[-1] ** -0.5
    out_BTHd = _shape(q_BTHd)
    for lot in _lots(q_BTHd):
        q_bKGTd, out_bKGTd = (_grouped(x[lot], k_BTKd.shape[2]) for x in (q_BTHd, out_BTHd))
        k_STd, v_STd = _rows(k_BTKd[lot]) * scale, _rows(v_BTKd[lot])
        for queries, seen in _blocks(q_BTHd.shape[1]):
            probabilities_SRE = _probabilities(_rows_of(q_bKGTd, queries), k_STd[:, seen], queries)
            out_bKGQd = out_bKGTd[..., queries, :]
            out_bKGQd.copy_((probabilities_SRE @ v_STd[:, seen]).view(out_bKGQd.shape))
    return out_BTHd


@torch.library.custom_op("minnow::cpu_causal_attention_backward", mutates_args=())
def cpu_causal_attention_backward(
    grad_BTHd: Tensor, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss by queries, keys and values, given that by what `cpu_causal_attention` returned.

    With P the probabilities and dO the gradient given:  dV = P^T dO,  dP = dO V^T,
    dS = P * (dP - rowsum(P * dP)),  dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d).
    """
    scale = q_BTHd.shape[-1] ** -0.5
    key_heads = k_BTKd.shape[2]
    grad_q_BTHd, grad_k_BTKd, grad_v_BTKd = _shapes(grad_BTHd, q_BTHd, k_BTKd, v_BTKd)
    for lot in _lots(q_BTHd):
        q_bKGTd, grad_bKGTd, grad_q_bKGTd = (_grouped(x[lot], key_heads) for x in (q_BTHd, grad_BTHd, grad_q_BTHd))
        k_STd, v_STd = _rows(k_BTKd[lot]) * scale, _rows(v_BTKd[lot])  # so the products with k, dQ too, are divided
        # Every block of queries adds to the same keys: not in bf16.
        sum_dtype = torch.promote_types(k_STd.dtype, torch.float32)
        grad_k_STd, grad_v_STd = (torch.zeros_like(x, dtype=sum_dtype) for x in (k_STd, v_STd))
        for queries, seen in _blocks(q_BTHd.shape[1]):
            q_SRd, grad_SRd = _rows_of(q_bKGTd, queries), _rows_of(grad_bKGTd, queries)
            probabilities_SRE = _probabilities(q_SRd, k_STd[:, seen], queries)
            grad_v_STd[:, seen] += probabilities_SRE.mT @ grad_SRd
            grad_SRE = grad_SRd @ v_STd[:, seen].mT
            grad_SRE = torch._softmax_backward_data(grad_SRE, probabilities_SRE, -1, grad_SRE.dtype)
            grad_q_bKGQd = grad_q_bKGTd[..., queries, :]
            grad_q_bKGQd.copy_((grad_SRE @ k_STd[:, seen]).view(grad_q_bKGQd.shape))
            grad_k_STd[:, seen] += grad_SRE.mT @ q_SRd
        grad_k_BTKd[lot] = (grad_k_STd * scale).unflatten(0, (-1, key_heads)).transpose(1, 2)
        grad_v_BTKd[lot] = grad_v_STd.unflatten(0, (-1, key_heads)).transpose(1, 2)
    return grad_q_BTHd, grad_k_BTKd, grad_v_BTKd


@cpu_causal_attention.register_fake
def _shape(q_BTHd: Tensor, *_: Tensor) -> Tensor:
    return torch.empty_like(q_BTHd, memory_format=torch.contiguous_format)


@cpu_causal_attention_backward.register_fake
def _shapes(grad_BTHd: Tensor, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return _shape(q_BTHd), _shape(k_BTKd), _shape(v_BTKd)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _backward(ctx: Any, grad_BTHd: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_causal_attention_backward(grad_BTHd, *ctx.saved_tensors)


cpu_causal_attention.register_autograd(_backward, setup_context=_save)


def _lots(q_BTHd: Tensor) -> Iterator[slice]:
    """So many sequences at a time as have SCORES scores in a block."""
    batch, length, heads, _ = q_BTHd.shape
    size = max(1, SCORES // max(1, heads * min(QUERIES, length) * length))
    return (slice(start, start + size) for start in range(0, batch, size))


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Some queries, and the keys that any of them sees."""
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        yield slice(start, end), slice(0, end)


def _grouped(x_bTHd: Tensor, key_heads: int) -> Tensor:
    """The same memory as [b, K, G, T, d]: the G query heads of each key head."""
    return x_bTHd.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)


def _rows_of(x_bKGTd: Tensor, queries: slice) -> Tensor:
    """Some queries, those of a group one after another: [S = b * K, R = G * Q, d]."""
    return x_bKGTd[..., queries, :].flatten(2, 3).flatten(0, 1)


def _rows(x_bTKd: Tensor) -> Tensor:
    """Keys or values as [S = b * K, T, d]."""
    return x_bTKd.transpose(1, 2).flatten(0, 1)


def _probabilities(q_SRd: Tensor, k_SEd: Tensor, queries: slice) -> Tensor:
    """softmax(q k) over keys [S, E, d], divided by sqrt(d) before, whose last ones are the queries' own: [S, R, E]."""
    num_queries = queries.stop - queries.start
    scores_SRE = q_SRd @ k_SEd.mT
    own_SGQQ = scores_SRE[..., queries].unflatten(1, (-1, num_queries))
    own_SGQQ += scores_SRE.new_full((num_queries, num_queries), float("-inf")).triu_(1)
    return torch.softmax(scores_SRE, dim=-1, out=scores_SRE)
