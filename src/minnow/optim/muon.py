"""Muon for all matrices of a model at once: same-shape matrices share one batched Newton-Schulz iteration."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from minnow.model.slices import is_sliced, local
from minnow.optim.newton_schulz import Polynomial, fast_dtype, orthogonalise
from minnow.optim.slices import on_whole_matrices

UpdateScale = Literal["original", "match_rms_adamw"]

# Elements of one batched iteration. On a CPU small enough for its buffers to stay in the caches and in the allocator's
# heap (at 26M parameters 3 to 8% faster than one large batch, 9% than one by one); elsewhere enough to fill the device.
_STACK_ELEMENTS_CPU = 4_000_000
_STACK_ELEMENTS_DEVICE = 64_000_000


class Muon(torch.optim.Optimizer):
    """Momentum, then the orthogonal factor of the update, with decoupled weight decay (Keller Jordan, 2024).

    For each matrix W [out, in] with gradient G, at step t = 0, 1, ...:

        mu = momentum_start + (momentum - momentum_start) min(t / momentum_warmup_steps, 1)
        B <- mu B + (1 - mu) G;    U = orthogonal factor of (mu B + (1 - mu) G)         (Nesterov)
        W <- (1 - lr weight_decay) W - lr s U

    with s = sqrt(max(1, out / in)) ("original") or 0.2 sqrt(max(out, in)) ("match_rms_adamw": updates as
    large as AdamW's, so that AdamW's learning rates serve; Liu et al., arXiv 2502.16982). A parameter of
    three dimensions is a stack of experts, each its own matrix. State per parameter: `momentum_buffer` (its
    shape) and `step` (0-D float32).
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 0.01,
        *,
        weight_decay: float = 0.0,
        momentum: float = 0.95,
        momentum_start: float = 0.85,
        momentum_warmup_steps: int = 300,
        polynomial: Polynomial = "polar_express",
        newton_schulz_steps: int = 5,
        update_scale: UpdateScale = "original",
        orthogonalise_dtype: torch.dtype | None = None,
    ) -> None:
        """Take 2-D and 3-D parameters; without `orthogonalise_dtype`, `fast_dtype` chooses it."""
        defaults = {
            "lr": lr,
            "weight_decay": weight_decay,
            "momentum": momentum,
            "momentum_start": momentum_start,
            "momentum_warmup_steps": momentum_warmup_steps,
            "polynomial": polynomial,
            "newton_schulz_steps": newton_schulz_steps,
            "update_scale": update_scale,
            "orthogonalise_dtype": orthogonalise_dtype,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            assert all(p.ndim in (2, 3) for p in group["params"]), "Muon takes matrices and stacks of matrices"

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for (momentum, _), params in self._buckets(group).items():
                _update(params, [self.state[p]["momentum_buffer"] for p in params], momentum, group)
        return loss

    def _buckets(self, group: dict[str, Any]) -> dict[tuple[float, Any], list[Tensor]]:
        """Sort the parameters with a gradient by momentum and kind of matrix, and count their step."""
        buckets: dict[tuple[float, Any], list[Tensor]] = {}
        for p in group["params"]:
            if p.grad is None:
                continue
            state = self.state[p]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(p, memory_format=torch.preserve_format)
                state["step"] = torch.zeros((), dtype=torch.float32)
            warmed = min(float(state["step"]) / max(group["momentum_warmup_steps"], 1), 1.0)
            momentum = group["momentum_start"] + (group["momentum"] - group["momentum_start"]) * warmed
            if group["momentum_warmup_steps"] == 0:
                momentum = group["momentum"]
            state["step"] += 1
            # A slice of a stack of experts is some whole experts; a slice of a matrix is some rows of it. They do not
            # go together, though an expert may be shaped like a matrix.
            sliced = p.ndim if is_sliced(p) else None
            buckets.setdefault((momentum, (p.shape[-2:], p.dtype, p.device, sliced)), []).append(p)
        return buckets


def _update(params: list[Tensor], buffers: list[Tensor], momentum: float, group: dict[str, Any]) -> None:
    """Take the step for parameters whose matrices have the same shape, one batch of limited size after another."""
    limit = _STACK_ELEMENTS_CPU if params[0].device.type == "cpu" else _STACK_ELEMENTS_DEVICE
    start = 0
    while start < len(params):
        stop, elements = start + 1, params[start].numel()
        while stop < len(params) and elements + params[stop].numel() <= limit:
            elements += params[stop].numel()
            stop += 1
        _update_stack(params[start:stop], buffers[start:stop], momentum, group)
        start = stop


def _update_stack(params: list[Tensor], buffers: list[Tensor], momentum: float, group: dict[str, Any]) -> None:
    """Take the step of one batch of same-shape matrices; of sliced ones (FSDP2), of the slices held here."""
    first = params[0]
    grads = [local(p.grad) for p in params if p.grad is not None]
    params, buffers = [local(p) for p in params], [local(buffer) for buffer in buffers]
    torch._foreach_lerp_(buffers, grads, 1 - momentum)
    counts = [p.shape[0] if p.ndim == 3 else 1 for p in params]
    update_BMN = params[0].new_empty(sum(counts), *params[0].shape[-2:])
    for grad, buffer, out_EMN in zip(grads, buffers, update_BMN.split(counts), strict=True):
        torch.lerp(grad, buffer, momentum, out=out_EMN.view(grad.shape))  # Nesterov, straight to its place
    orthogonal = partial(
        orthogonalise,
        polynomial=group["polynomial"],
        steps=group["newton_schulz_steps"],
        dtype=group["orthogonalise_dtype"] or fast_dtype(first),
    )
    if is_sliced(first) and first.ndim == 2:
        update_BMN = on_whole_matrices(orthogonal, update_BMN, first)
    elif update_BMN.numel():
        update_BMN = orthogonal(update_BMN)
    update_BMN = update_BMN.to(params[0].dtype)  # the updates below are one kernel where all is of one dtype
    lr, scale = group["lr"], scale_of(first, group["update_scale"])
    updates = [update_EMN.view(p.shape) for p, update_EMN in zip(params, update_BMN.split(counts), strict=True)]
    torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
    torch._foreach_add_(params, updates, alpha=-lr * scale)


def scale_of(parameter: Tensor, update_scale: UpdateScale) -> float:
    """Factor on the orthogonal update of a matrix [..., out, in]."""
    rows, columns = parameter.shape[-2:]
    if update_scale == "original":
        return math.sqrt(max(1.0, rows / columns))
    return 0.2 * math.sqrt(max(rows, columns))
