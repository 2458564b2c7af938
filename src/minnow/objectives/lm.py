"""The language-model loss without the logits: the head and the cross-entropy together, some tokens at a time.

At 8 x 1024 tokens and a vocabulary of 6,400 the float32 logits alone take 210 MB, and their softmax and
gradient as much again each. Here one chunk of tokens is taken through the head, the softmax and both
gradients before the next.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Tokens a chunk, by measurement on a CPU at N = 8192, D = 512, V = 6400 in float32: 64 takes 1.4 times as long, 128 and
# 256 a little longer, 1024 as long with more memory.
CHUNK_SIZE = 512
# Compiled, the softmax writes nothing in float32, and larger products are worth more than the caches: in bf16 with AMX,
# 512 tokens take 1.15 times as long as 2048, 4096 take 1.25 times as long.
_COMPILED_CHUNK_SIZE, _COMPILED_CHUNK_LOGITS = 2048, 2**24
# On a GPU a chunk's dozen kernels are launched in about as many times 5 microseconds: so many logits (128 MiB in
# float32) keep it busy for longer than that.
_CHUNK_LOGITS_DEVICE = 2**25


def chunk_tokens(device: torch.device, vocab_size: int, *, compiled: bool = False) -> int:
    """Tokens a chunk: on a CPU what its caches hold, elsewhere enough to keep the device busy."""
    if device.type == "cpu" and compiled:
        return max(CHUNK_SIZE, min(_COMPILED_CHUNK_SIZE, _COMPILED_CHUNK_LOGITS // vocab_size // 128 * 128))
    if device.type == "cpu":
        return CHUNK_SIZE
    return max(CHUNK_SIZE, _CHUNK_LOGITS_DEVICE // vocab_size // 128 * 128)


class LinearCrossEntropy(NamedTuple):
    """Sums over tokens as 0-D tensors, float32 (float64 for float64 hidden states)."""

    loss_sum: Tensor
    """nll_sum + z_loss_sum: call backward on this one."""
    nll_sum: Tensor
    """Sum of weight x negative log-likelihood in nats; without gradient."""
    z_loss_sum: Tensor
    """z_loss x sum of weight x (log of the softmax's denominator)^2; without gradient."""


def linear_cross_entropy(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    compiled: bool = False,
    supervised_S: Tensor | None = None,
) -> LinearCrossEntropy:
    """Sum the weighted cross-entropy of `targets_N` under softmax(hidden W^T).

    With logits l_i = W h_i and Z_i = log sum_v exp(l_iv):

        loss_sum = sum_i w_i (Z_i - l_i[target_i])  +  z_loss sum_i w_i Z_i^2

    The second term (z-loss; Chowdhery et al., PaLM, arXiv 2204.02311) keeps the logits from drifting. Divide
    by the global sum of weights to get a mean (docs/design.md, decision 4).

    Positions of weight 0 are left out before anything is computed: their target may be any number, their
    hidden state NaN. The head is multiplied in the dtype of `hidden_ND` (`weight_VD` may be the float32
    master of a bfloat16 run), the softmax and all sums are float32; the gradient of the head is added up over
    chunks in float32.

    The gradients are computed in the forward pass, while a chunk's logits are at hand (as in Liger-Kernel,
    arXiv 2410.10989), and multiplied by the incoming gradient in the backward pass. That is why only
    `loss_sum` has one: two outputs could ask for two different multiples. `weights_N` gets no gradient, and
    there is no second derivative.

    Shapes: hidden [N, D], weight [V, D], targets [N] int64, weights [N] float. `chunk_size` is in tokens, None takes
    what suits the device. `compiled` runs the softmax part through torch.compile, which needs a C++ compiler on a CPU.
    `supervised_S` are the places of `weights_N` that are not 0, int64, where the caller knows them: to look for them on
    a GPU, the host has to wait for it.
    """
    chunk_size = chunk_size or chunk_tokens(hidden_ND.device, len(weight_VD), compiled=compiled)
    selected_S = weights_N.nonzero().squeeze(1) if supervised_S is None else supervised_S
    compute = _compiled_softmax_chunk() if compiled else _softmax_chunk
    arguments = (hidden_ND, weight_VD, targets_N, weights_N, selected_S, z_loss, chunk_size, compute)
    if torch.is_grad_enabled() and (hidden_ND.requires_grad or weight_VD.requires_grad):
        return LinearCrossEntropy(*_LinearCrossEntropy.apply(*arguments))
    nll_sum, z_loss_sum, _, _ = _sums_and_gradients(*arguments, hidden_gradient=False, weight_gradient=False)
    return LinearCrossEntropy(nll_sum + z_loss_sum, nll_sum, z_loss_sum)


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
        selected_S = rest[2]
        nll_sum, z_loss_sum, hidden_gradient_SD, weight_gradient_VD = _sums_and_gradients(
            hidden_ND,
            weight_VD,
            *rest,
            hidden_gradient=ctx.needs_input_grad[0],
            weight_gradient=ctx.needs_input_grad[1],
        )
        ctx.save_for_backward(selected_S, hidden_gradient_SD, weight_gradient_VD)
        ctx.num_tokens = len(hidden_ND)
        ctx.mark_non_differentiable(nll_sum, z_loss_sum)
        return nll_sum + z_loss_sum, nll_sum, z_loss_sum

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        selected_S, hidden_gradient_SD, weight_gradient_VD = ctx.saved_tensors
        hidden_gradient_ND = None
        if hidden_gradient_SD is not None:
            scaled_SD = hidden_gradient_SD * upstream.to(hidden_gradient_SD.dtype)
            hidden_gradient_ND = _scatter(scaled_SD, selected_S, ctx.num_tokens)
        if weight_gradient_VD is not None:
            weight_gradient_VD = weight_gradient_VD * upstream
        return (hidden_gradient_ND, weight_gradient_VD, *[None] * 6)


def _sums_and_gradients(
    hidden_ND: Tensor,
    weight_VD: Tensor,
    targets_N: Tensor,
    weights_N: Tensor,
    selected_S: Tensor,
    z_loss: float,
    chunk_size: int,
    compute: Callable[..., tuple[Tensor, Tensor, Tensor | None]],
    *,
    hidden_gradient: bool,
    weight_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """Give (nll_sum, z_loss_sum, gradient of the selected hidden states, gradient of the weight) of
    `loss_sum`."""
    sum_dtype = _sum_dtype(hidden_ND)
    head_VD = weight_VD.to(hidden_ND.dtype)
    nll_sum = torch.zeros((), dtype=sum_dtype, device=hidden_ND.device)
    z_loss_sum = torch.zeros_like(nll_sum)
    hidden_gradient_SD = hidden_ND.new_empty(len(selected_S), hidden_ND.shape[1]) if hidden_gradient else None
    weight_gradient_VD = torch.zeros_like(weight_VD, dtype=sum_dtype) if weight_gradient else None
    logits_CV = hidden_ND.new_empty(min(chunk_size, len(selected_S)), len(head_VD))
    for chunk, index_C in _chunks(selected_S, chunk_size):
        hidden_CD = hidden_ND[index_C]
        logits_CV = torch.mm(hidden_CD, head_VD.T, out=logits_CV[: len(hidden_CD)])
        chunk_nll, chunk_z_loss, gradient_CV = compute(
            logits_CV, targets_N[index_C], weights_N[index_C], z_loss, hidden_gradient or weight_gradient
        )
        nll_sum += chunk_nll
        z_loss_sum += chunk_z_loss
        if gradient_CV is None:
            continue
        if hidden_gradient_SD is not None:
            torch.mm(gradient_CV, head_VD, out=hidden_gradient_SD[chunk])
        if weight_gradient_VD is not None:
            _add_product_(weight_gradient_VD, gradient_CV, hidden_CD)
    return nll_sum, z_loss_sum, hidden_gradient_SD, weight_gradient_VD


def _softmax_chunk(
    logits_CV: Tensor, targets_C: Tensor, weights_C: Tensor, z_loss: float, gradient: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Give (nll_sum, z_loss_sum, d loss_sum / d logits in the logits' dtype, None unless asked) of one chunk.

    d / d l_iv = w_i ((1 + 2 z_loss Z_i) softmax_iv - [v = target_i])
    """
    sum_dtype = _sum_dtype(logits_CV)
    weights_C = weights_C.to(sum_dtype)
    log_softmax_CV = torch.log_softmax(logits_CV, dim=1, dtype=sum_dtype)
    target_C1 = targets_C.unsqueeze(1)
    log_probability_C = log_softmax_CV.gather(1, target_C1).squeeze(1)
    nll_sum = -(weights_C * log_probability_C).sum()
    scale_C = weights_C
    z_loss_sum = torch.zeros_like(nll_sum)
    if z_loss != 0.0:
        log_denominator_C = logits_CV.gather(1, target_C1).squeeze(1).to(sum_dtype) - log_probability_C
        z_loss_sum = z_loss * (weights_C * log_denominator_C.square()).sum()
        scale_C = weights_C * (1.0 + 2.0 * z_loss * log_denominator_C)
    if not gradient:
        return nll_sum, z_loss_sum, None
    target_gradient_C = scale_C * log_probability_C.exp() - weights_C
    # Rounded before the target is put in: the compiler then writes no logits in float32.
    gradient_CV = log_softmax_CV.exp_().mul_(scale_C.unsqueeze(1)).to(logits_CV.dtype)
    gradient_CV.scatter_(1, target_C1, target_gradient_C.unsqueeze(1).to(gradient_CV.dtype))
    return nll_sum, z_loss_sum, gradient_CV


def token_logprobs(hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, *, chunk_size: int | None = None) -> Tensor:
    """Log-probability of each target under softmax(hidden W^T), [N] in float32 (float64 for float64 hidden
    states).

    For losses that are not a weighted sum of log-probabilities (preference, policy). The gradient reaches
    `hidden_ND` and `weight_VD`; the backward pass computes a chunk's logits again, as it cannot know the
    incoming gradient before. Select the positions you need before the call. Shapes and dtypes as in
    `linear_cross_entropy`.
    """
    chunk_size = chunk_size or chunk_tokens(hidden_ND.device, len(weight_VD))
    return _TokenLogprobs.apply(hidden_ND, weight_VD, targets_N, chunk_size)


class _TokenLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_ND: Tensor, weight_VD: Tensor, targets_N: Tensor, chunk_size: int) -> Tensor:
        sum_dtype = _sum_dtype(hidden_ND)
        head_VD = weight_VD.to(hidden_ND.dtype)
        logprobs_N = torch.empty(len(hidden_ND), dtype=sum_dtype, device=hidden_ND.device)
        for start in range(0, len(hidden_ND), chunk_size):
            chunk = slice(start, start + chunk_size)
            logits_CV = hidden_ND[chunk] @ head_VD.T
            log_denominator_C = torch.logsumexp(logits_CV.to(sum_dtype), dim=1)
            target_C = logits_CV.gather(1, targets_N[chunk].unsqueeze(1)).squeeze(1)
            logprobs_N[chunk] = target_C.to(sum_dtype) - log_denominator_C
        ctx.save_for_backward(hidden_ND, weight_VD, targets_N)
        ctx.chunk_size = chunk_size
        return logprobs_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream_N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_ND, weight_VD, targets_N = ctx.saved_tensors
        head_VD = weight_VD.to(hidden_ND.dtype)
        hidden_gradient_ND = torch.empty_like(hidden_ND) if ctx.needs_input_grad[0] else None
        weight_gradient_VD = (
            torch.zeros_like(weight_VD, dtype=_sum_dtype(hidden_ND)) if ctx.needs_input_grad[1] else None
        )
        for start in range(0, len(hidden_ND), ctx.chunk_size):
            chunk = slice(start, start + ctx.chunk_size)
            hidden_CD = hidden_ND[chunk]
            # The log-probability is minus the loss, so the loss's weights are minus the incoming gradient.
            _, _, gradient_CV = _softmax_chunk(
                hidden_CD @ head_VD.T, targets_N[chunk], -upstream_N[chunk], z_loss=0.0, gradient=True
            )
            assert gradient_CV is not None
            if hidden_gradient_ND is not None:
                torch.mm(gradient_CV, head_VD, out=hidden_gradient_ND[chunk])
            if weight_gradient_VD is not None:
                _add_product_(weight_gradient_VD, gradient_CV, hidden_CD)
        return hidden_gradient_ND, weight_gradient_VD, None, None


def bits_per_byte(nats: float, utf8_bytes: float) -> float:
    """Bits a byte of text: nats summed over the text's tokens / (ln 2 x its UTF-8 bytes).

    Unlike a loss per token it compares models with different tokenizers.
    """
    return nats / (math.log(2) * utf8_bytes)


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _chunks(selected_S: Tensor, chunk_size: int) -> Iterator[tuple[slice, Tensor]]:
    """Give (place among the selected, their indices) of chunks of at most `chunk_size`."""
    for start in range(0, len(selected_S), chunk_size):
        chunk = slice(start, min(start + chunk_size, len(selected_S)))
        yield chunk, selected_S[chunk]


def _add_product_(total_VD: Tensor, gradient_CV: Tensor, hidden_CD: Tensor) -> None:
    """Add gradient^T hidden to a total in float32, whatever the operands' dtype."""
    if gradient_CV.dtype == total_VD.dtype:
        total_VD.addmm_(gradient_CV.T, hidden_CD)
    else:
        total_VD += gradient_CV.T @ hidden_CD


def _scatter(values_SD: Tensor, selected_S: Tensor, num_tokens: int) -> Tensor:
    """Put the selected rows back among rows of zeros."""
    if len(selected_S) == num_tokens:
        return values_SD
    return values_SD.new_zeros(num_tokens, values_SD.shape[1]).index_copy_(0, selected_S, values_SD)


_compiled: list[Callable[..., tuple[Tensor, Tensor, Tensor | None]]] = []


def _compiled_softmax_chunk() -> Callable[..., tuple[Tensor, Tensor, Tensor | None]]:
    """Compile the softmax part once a process; chunks of any length share the code."""
    if not _compiled:
        _compiled.append(torch.compile(_softmax_chunk, dynamic=True))
    return _compiled[0]
