"""Causal attention for CPUs that multiply bf16 fast, out of plain matrix products.

torch's flash attention for CPUs cuts its work into products of a few rows, each with a price of its own in bf16. Here
many heads are multiplied at once, some queries at a time. As in flash attention (2205.14135) no score is kept for the
backward pass, which computes them again. They are rounded to bf16, where flash attention has them in float32: with
scores up to 50 the outputs are a percent off.

With a C++ compiler bf16 goes through cpu_attention.cpp instead, which does the same for one block after another in the
caches, with scores in float32: twice as fast. docs/experiments.md has what both give at which length.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

from minnow.model.cpp import load_cpp

QUERIES = 128
"""Queries at a time: with fewer, less of the future is multiplied in vain; with more, the products are larger."""

SCORES = 2**21
"""Scores at a time, 4 MB, or those of one key head if they are more: about what a processor's caches hold."""


def cpu_causal_attention(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> Tensor:
    """Every query sees the keys up to its own place: softmax(q k / sqrt(d)) v, [B, T, H, d], heads grouped (GQA)."""
    out_BTHd: Tensor = attention_and_denominators(q_BTHd, k_BTKd, v_BTKd)[0]
    return out_BTHd


@library.custom_op("minnow::cpu_causal_attention", mutates_args=())
def attention_and_denominators(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor) -> tuple[Tensor, Tensor]:
    """`cpu_causal_attention`, and for the backward pass of the C++ log2 of each softmax's denominator, fp32 [B, H, T].

    One operation to whoever looks on: selective checkpointing keeps what it returns, and nothing of its inside.
    """
    out_BTHd, log_BHT = _empty_outputs(q_BTHd)
    kernel = kernel_for(q_BTHd, k_BTKd, v_BTKd)
    if kernel is None:
        _attend_in_blocks(q_BTHd, k_BTKd, v_BTKd, out_BTHd)
        log_BHT.zero_()
    elif q_BTHd.numel():
        inputs = [x.contiguous() for x in (q_BTHd, k_BTKd, v_BTKd)]
        kernel.forward(*_sizes(q_BTHd, k_BTKd), *_addresses(*inputs, out_BTHd, log_BHT))
    return out_BTHd, log_BHT


@library.custom_op("minnow::cpu_causal_attention_backward", mutates_args=())
def cpu_causal_attention_backward(
    grad_BTHd: Tensor, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, out_BTHd: Tensor, log_BHT: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the loss by queries, keys and values, given that by what `cpu_causal_attention` returned.

    With P the probabilities and dO the gradient given:  dV = P^T dO,  dP = dO V^T,
    dS = P * (dP - rowsum(P * dP)),  dQ = dS K / sqrt(d),  dK = dS^T Q / sqrt(d).  And rowsum(P * dP) = rowsum(O * dO).
    """
    grads = _empty_grads(grad_BTHd, q_BTHd, k_BTKd, v_BTKd)
    kernel = kernel_for(q_BTHd, k_BTKd, v_BTKd)
    if kernel is None:
        _gradients_in_blocks(grad_BTHd, q_BTHd, k_BTKd, v_BTKd, grads)
    elif q_BTHd.numel():
        inputs = [x.contiguous() for x in (grad_BTHd, q_BTHd, k_BTKd, v_BTKd)]
        kernel.backward(*_sizes(q_BTHd, k_BTKd), *_addresses(*inputs, out_BTHd, log_BHT, *grads))
    return grads


@attention_and_denominators.register_fake
def _empty_outputs(q_BTHd: Tensor, *_: Tensor) -> tuple[Tensor, Tensor]:
    batch, length, heads, _size = q_BTHd.shape
    return _contiguous_like(q_BTHd), q_BTHd.new_empty((batch, heads, length), dtype=torch.float32)


@cpu_causal_attention_backward.register_fake
def _empty_grads(
    grad_BTHd: Tensor, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, *_: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return _contiguous_like(q_BTHd), _contiguous_like(k_BTKd), _contiguous_like(v_BTKd)


def _contiguous_like(x: Tensor) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs, *output)
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad_BTHd: Tensor, _: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    return cpu_causal_attention_backward(grad_BTHd, *ctx.saved_tensors)


attention_and_denominators.register_autograd(_backward, setup_context=_save)


_OPERATIONS = library.Library("minnow", "FRAGMENT")
_OPERATIONS.define("cpu_decode_attention(Tensor q, Tensor keys, Tensor values, Tensor places) -> Tensor")


def cpu_decode_attention(q_BHd: Tensor, keys_RLKd: Tensor, values_RLKd: Tensor, places_B: Tensor) -> Tensor:
    """One new token for each of the first B rows, which sees its row's places up to its own: [B, H, d]; no gradients.

    By the C++ alone (`kernel`). Places int64; d a multiple of 16. What stands behind a row's place must be finite.
    """
    out_BHd: Tensor = torch.ops.minnow.cpu_decode_attention(q_BHd, keys_RLKd, values_RLKd, places_B)
    return out_BHd


# Not by `custom_op`, whose checks take longer than the attention of a few rows.
@library.impl(_OPERATIONS, "cpu_decode_attention", "CPU")
def _decode(q_BHd: Tensor, keys_RLKd: Tensor, values_RLKd: Tensor, places_B: Tensor) -> Tensor:
    out_BHd = _contiguous_like(q_BHd)
    loaded = kernel()
    assert loaded is not None
    rows, heads, size = q_BHd.shape
    sizes = [ctypes.c_int64(x) for x in (rows, keys_RLKd.shape[1], heads, keys_RLKd.shape[2], size)]
    loaded.decode(*sizes, *_addresses(q_BHd.contiguous(), keys_RLKd, values_RLKd, places_B, out_BHd))
    return out_BHd


@library.register_fake("minnow::cpu_decode_attention")
def _empty_decoded(q_BHd: Tensor, *_: Tensor) -> Tensor:
    return _contiguous_like(q_BHd)


def kernel_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """The C++, where it is for such tensors: bf16 throughout, heads of an even size."""
    fit = all(x.dtype == torch.bfloat16 and x.shape[-1] % 2 == 0 for x in tensors)
    return kernel() if fit else None


@cache
def kernel() -> ctypes.CDLL | None:
    """cpu_attention.cpp, where it could be built and torch multiplies blocks of bf16 on this processor."""
    built = load_cpp(Path(__file__).with_suffix(".cpp"))
    return built if built is not None and built.available() else None


def _sizes(q_BTHd: Tensor, k_BTKd: Tensor) -> list[ctypes.c_int64]:
    batch, length, heads, size = q_BTHd.shape
    return [ctypes.c_int64(x) for x in (batch, length, heads, k_BTKd.shape[2], size)]


def _addresses(*tensors: Tensor) -> list[ctypes.c_void_p]:
    return [ctypes.c_void_p(x.data_ptr()) for x in tensors]


def _attend_in_blocks(q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, out_BTHd: Tensor) -> None:
    q_BKGTd, out_BKGTd = (_grouped(x, k_BTKd.shape[2]) for x in (q_BTHd, out_BTHd))
    k_BKTd, v_BKTd = k_BTKd.transpose(1, 2), v_BTKd.transpose(1, 2)
    for lot in _lots(q_BKGTd):
        k_STd, v_STd = _centred(k_BKTd[lot].flatten(0, 1)), v_BKTd[lot].flatten(0, 1)
        for queries, seen in _blocks(q_BKGTd.shape[3]):
            q_SRd = _rows(q_BKGTd[lot], queries)
            out = out_BKGTd[lot][..., queries, :]
            out.copy_((_probabilities(q_SRd, k_STd[:, seen], queries) @ v_STd[:, seen]).view(out.shape))


def _gradients_in_blocks(
    grad_BTHd: Tensor, q_BTHd: Tensor, k_BTKd: Tensor, v_BTKd: Tensor, grads: tuple[Tensor, Tensor, Tensor]
) -> None:
    key_heads, scale = k_BTKd.shape[2], k_BTKd.shape[3] ** -0.5
    grad_q_BTHd, grad_k_BTKd, grad_v_BTKd = grads
    q_BKGTd, grad_BKGTd, grad_q_BKGTd = (_grouped(x, key_heads) for x in (q_BTHd, grad_BTHd, grad_q_BTHd))
    k_BKTd, v_BKTd, grad_k_BKTd, grad_v_BKTd = (x.transpose(1, 2) for x in (k_BTKd, v_BTKd, grad_k_BTKd, grad_v_BTKd))
    for lot in _lots(q_BKGTd):
        # Centred and divided: the rows of dS sum to zero, so dQ is the same with them.
        k_STd, v_STd = _centred(k_BKTd[lot].flatten(0, 1)), v_BKTd[lot].flatten(0, 1)
        # Every block of queries adds to the same keys: not in bf16.
        sum_dtype = torch.promote_types(k_STd.dtype, torch.float32)
        grad_k_STd, grad_v_STd = (torch.zeros_like(x, dtype=sum_dtype) for x in (k_STd, v_STd))
        for queries, seen in _blocks(q_BKGTd.shape[3]):
            q_SRd, grad_SRd = _rows(q_BKGTd[lot], queries), _rows(grad_BKGTd[lot], queries)
            probabilities_SRE = _probabilities(q_SRd, k_STd[:, seen], queries)
            grad_v_STd[:, seen] += probabilities_SRE.mT @ grad_SRd
            grad_SRE = grad_SRd @ v_STd[:, seen].mT
            grad_SRE = torch._softmax_backward_data(grad_SRE, probabilities_SRE, -1, grad_SRE.dtype)
            grad_q = grad_q_BKGTd[lot][..., queries, :]
            grad_q.copy_((grad_SRE @ k_STd[:, seen]).view(grad_q.shape))
            grad_k_STd[:, seen] += grad_SRE.mT @ q_SRd
        grad_k, grad_v = grad_k_BKTd[lot], grad_v_BKTd[lot]
        grad_k.copy_(grad_k_STd.mul_(scale).view(grad_k.shape))
        grad_v.copy_(grad_v_STd.view(grad_v.shape))


def _grouped(x_BTHd: Tensor, key_heads: int) -> Tensor:
    """The same memory as [B, K, G, T, d]: the G query heads of each key head."""
    return x_BTHd.unflatten(2, (key_heads, -1)).permute(0, 2, 3, 1, 4)


def _lots(q_BKGTd: Tensor) -> Iterator[tuple[slice, slice]]:
    """Some sequences and key heads at a time, so many as have SCORES scores in a block of queries."""
    batch, key_heads, group, length, _ = q_BKGTd.shape
    fitting = max(1, SCORES // max(1, group * min(QUERIES, length) * length))
    sequences, heads = max(1, fitting // key_heads), min(fitting, key_heads)
    for first in range(0, batch, sequences):
        for head in range(0, key_heads, heads):
            yield slice(first, first + sequences), slice(head, head + heads)


def _blocks(length: int) -> Iterator[tuple[slice, slice]]:
    """Some queries, and the keys that any of them sees."""
    for start in range(0, length, QUERIES):
        end = min(start + QUERIES, length)
        yield slice(start, end), slice(0, end)


def _rows(x_bKGTd: Tensor, queries: slice) -> Tensor:
    """Some queries, those of a group one after another: [S = b * K, R = G * Q, d]."""
    return x_bKGTd[..., queries, :].flatten(2, 3).flatten(0, 1)


def _centred(k_STd: Tensor) -> Tensor:
    """Keys less their mean, divided by sqrt(d).

    What all scores of a query have in common makes no difference to their softmax, and bf16 would round away what sets
    them apart: biases like Qwen2's shift all by hundreds.
    """
    scale = k_STd.shape[-1] ** -0.5
    return torch.add(k_STd.mean(1, keepdim=True) * -scale, k_STd, alpha=scale)  # rounded once


def _probabilities(q_SRd: Tensor, k_SEd: Tensor, queries: slice) -> Tensor:
    """softmax(q k) over keys [S, E, d] whose last ones are the queries' own: [S, R, E]."""
    num_queries = queries.stop - queries.start
    scores_SRE = q_SRd @ k_SEd.mT
    future_QQ = torch.ones(num_queries, num_queries, dtype=torch.bool, device=scores_SRE.device).triu_(1)
    scores_SRE[..., queries].unflatten(1, (-1, num_queries)).masked_fill_(future_QQ, float("-inf"))
    return torch.softmax(scores_SRE, dim=-1, out=scores_SRE)
