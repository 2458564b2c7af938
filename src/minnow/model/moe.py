# ruff: noqa: N815 (fields carry their shape)
"""Routed experts: a router chooses k of E small MLPs for each token, and only those work on it.

Tokens are sorted by expert and go through one grouped product a matrix; none is ever dropped. Three families share
this module: softmax routing (Qwen3-MoE), sigmoid routing with a selection bias and shared experts (DeepSeek-V3's
router, GLM-4-MoE), and noisy top-k (Shazeer et al. 2017), which is the first with noise in training.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minnow.model.experts_config import ExpertsConfig
from minnow.model.int8 import int8_linear

# Slots of an expert on CUDA, in bf16: each expert's tokens begin at 16 bytes in the gradient of the weights, too.
_CUDA_ALIGNMENT = 8


class Decisions(NamedTuple):
    """What one layer's router made of the N tokens that are no filler."""

    probabilities_NE: Tensor
    """fp32, each row sums to 1, with gradient: softmax, or sigmoid scores divided by their sum."""
    experts_Nk: Tensor
    """int64: the chosen experts."""


@dataclass
class Routing:
    """What a training step tells the routers of a model, and what they report back: one for each micro-batch."""

    filler_BT: Tensor
    """bool: places that hold nothing; they go to no expert."""
    noise: Callable[[int], Tensor] | None = None
    """Standard normal noise [B, T, E] for the layer of this number; None: none."""
    decisions: list[tuple[int, Decisions]] = field(default_factory=list)
    """(layer, its decisions), as the layers are passed."""

    @cached_property
    def real_N(self) -> Tensor | None:
        """Places of the N real tokens among the flattened B * T; None if all are."""
        return (~self.filler_BT).flatten().nonzero().squeeze(1) if self.filler_BT.any() else None


class Router(nn.Module):
    """Scores of every expert, the choice of k, and their weights; in fp32 whatever the compute dtype.

    softmax: p = softmax(W x), the k greatest (Qwen3-MoE; k = 1 is the Switch Transformer, 2101.03961).
    sigmoid: s = sigmoid(W x), the k greatest of s + b within the best groups; the bias b chooses but does not weigh,
    and is moved by the training loop, not by gradient (DeepSeek-V3, 2412.19437; 2408.15664).
    noisy: W x + noise * softplus(W_noise x) in the place of W x (1701.06538, equation 4), in training only.
    """

    weight: nn.Parameter
    e_score_correction_bias: Tensor | None
    noise_weight: nn.Parameter | None

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, width))
        self.noise_weight = nn.Parameter(torch.empty(config.num_experts, width)) if config.noisy else None
        bias = torch.zeros(config.num_experts) if config.scoring == "sigmoid" else None
        self.register_buffer("e_score_correction_bias", bias)

    def forward(self, x_ND: Tensor, noise_NE: Tensor | None = None) -> tuple[Tensor, Decisions]:
        """x [N, D] -> weights fp32 [N, k] of the chosen experts, and the decisions."""
        x_ND = x_ND.float()
        logits_NE = F.linear(x_ND, self.weight.float())
        if noise_NE is not None and self.noise_weight is not None:
            logits_NE = logits_NE + noise_NE * F.softplus(F.linear(x_ND, self.noise_weight.float()))
        if self.e_score_correction_bias is None:
            scores_NE = probabilities_NE = logits_NE.softmax(-1)
            experts_Nk = scores_NE.topk(self.config.num_experts_per_tok, dim=-1).indices
        else:
            scores_NE = logits_NE.sigmoid()
            probabilities_NE = scores_NE / scores_NE.sum(-1, keepdim=True)
            experts_Nk = self._choose(scores_NE.detach() + self.e_score_correction_bias)
        weights_Nk = scores_NE.gather(1, experts_Nk)
        if self.config.norm_topk_prob:
            weights_Nk = weights_Nk / (weights_Nk.sum(-1, keepdim=True) + 1e-20)
        return weights_Nk * self.config.routed_scaling_factor, Decisions(probabilities_NE, experts_Nk)

    def _choose(self, scores_NE: Tensor) -> Tensor:
        """Choose among the experts of the best groups; a group is as good as the sum of its two best."""
        config = self.config
        if config.n_group > 1:
            grouped_NGM = scores_NE.unflatten(1, (config.n_group, -1))
            best_NG = grouped_NGM.topk(2, dim=-1).values.sum(-1)
            kept_NG = torch.zeros_like(best_NG).scatter_(1, best_NG.topk(config.topk_group, dim=-1).indices, 1.0)
            scores_NE = grouped_NGM.masked_fill(kept_NG.unsqueeze(-1) == 0, float("-inf")).flatten(1)
        return scores_NE.topk(config.num_experts_per_tok, dim=-1).indices


class Experts(nn.Module):
    """E SwiGLU MLPs without biases, stacked: gate and up [E, F, D], down [E, D, F].

    The scales are None, or fp32 [E, F] and [E, D] where quantize.py has made the weights int8.
    """

    gate_proj_scale: nn.Parameter | None
    up_proj_scale: nn.Parameter | None
    down_proj_scale: nn.Parameter | None

    def __init__(self, width: int, config: ExpertsConfig) -> None:
        super().__init__()
        count, inner = config.num_experts, config.moe_intermediate_size
        self.gate_proj = nn.Parameter(torch.empty(count, inner, width))
        self.up_proj = nn.Parameter(torch.empty(count, inner, width))
        self.down_proj = nn.Parameter(torch.empty(count, width, inner))
        for name in ("gate_proj_scale", "up_proj_scale", "down_proj_scale"):
            self.register_parameter(name, None)

    def forward(self, x_ND: Tensor, experts_Nk: Tensor, weights_Nk: Tensor) -> Tensor:
        """Sum of each token's chosen experts' outputs, weighted: [N, D] in x's dtype."""
        # The kernels read rows 16 bytes at a time.
        sides = (side * x_ND.itemsize % 16 for side in self.gate_proj.shape[1:])
        grouped = self.gate_proj_scale is None and not any(sides) and _has_grouped_mm(x_ND.device, x_ND.dtype)
        alignment = _CUDA_ALIGNMENT if grouped and x_ND.device.type == "cuda" else 1
        plan = make_plan(experts_Nk, len(self.gate_proj), alignment)

        def multiply(x_PI: Tensor, weight_EOI: Tensor, scale_EO: Tensor | None) -> Tensor:
            if scale_EO is not None:
                return looped_int8_product(x_PI, weight_EOI, scale_EO, plan)
            return (grouped_product if grouped else looped_product)(x_PI, weight_EOI, plan)

        x_PD = _ToExperts.apply(x_ND, plan)
        gate_PF = multiply(x_PD, self.gate_proj, self.gate_proj_scale)
        hidden_PF = F.silu(gate_PF) * multiply(x_PD, self.up_proj, self.up_proj_scale)
        out_AD = _FromExperts.apply(multiply(hidden_PF, self.down_proj, self.down_proj_scale), plan)
        return torch.einsum("nk,nkd->nd", weights_Nk.to(x_ND.dtype), out_AD.view(*experts_Nk.shape, x_ND.shape[1]))


class MoE(nn.Module):
    """Router and experts of a layer, beside shared experts (added by the layer) or alone."""

    def __init__(self, width: int, config: ExpertsConfig, shared_experts: nn.Module | None) -> None:
        super().__init__()
        self.gate = Router(width, config)
        self.experts = Experts(width, config)
        self.shared_experts = shared_experts

    def forward(self, x_BTD: Tensor, layer: int, routing: Routing | None) -> tuple[Tensor, Decisions]:
        """Output of the routed experts [B, T, D], zero on filler, and the decisions about the real tokens."""
        x_ND, real_N = x_BTD.flatten(0, 1), None
        noise_NE = None
        if routing is not None:
            real_N = routing.real_N
            noise_NE = None if routing.noise is None else routing.noise(layer).flatten(0, 1)
        if real_N is not None:
            x_ND = x_ND.index_select(0, real_N)
            noise_NE = None if noise_NE is None else noise_NE.index_select(0, real_N)
        weights_Nk, decisions = self.gate(x_ND, noise_NE)
        out_ND = self.experts(x_ND, decisions.experts_Nk, weights_Nk)
        if real_N is not None:
            out_ND = out_ND.new_zeros(x_BTD.shape).flatten(0, 1).index_copy(0, real_N, out_ND)
        return out_ND.view(x_BTD.shape), decisions


@dataclass(frozen=True)
class Plan:
    """Where the A = N k assignments of tokens to experts stand when sorted by expert: P slots, padding included."""

    slot_of_assignment: Tensor
    """int64 [A]; assignment n k + j is token n's j-th expert."""
    token_of_slot: Tensor
    """int64 [P]; padding reads token 0: any finite value will do."""
    counts: Tensor
    """int64 [E]: slots of each expert, padding included."""
    k: int


def make_plan(experts_Nk: Tensor, num_experts: int, alignment: int = 1) -> Plan:
    """Sort the assignments by expert, each expert's slots beginning at a multiple of `alignment`.

    Nothing is read back from the device: with an alignment the number of slots is the most there can be, and what lies
    behind the last expert's slots belongs to nobody.
    """
    experts_A = experts_Nk.flatten()
    device, assignments = experts_A.device, len(experts_A)
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=device)
    counts_E.index_add_(0, experts_A, torch.ones_like(experts_A))
    padded_E = (counts_E + alignment - 1) // alignment * alignment
    order_A = experts_A.argsort(stable=True)
    shift_E = (padded_E - counts_E).cumsum(0) - (padded_E - counts_E)  # padding before each expert
    slots_A = torch.arange(assignments, device=device) + shift_E[experts_A[order_A]]
    slot_of_assignment = torch.empty_like(order_A).index_copy_(0, order_A, slots_A)
    slots = assignments + num_experts * (alignment - 1)
    token_of_slot = torch.zeros(slots, dtype=torch.int64, device=device)
    k = experts_Nk.shape[1]
    token_of_slot.index_copy_(0, slots_A, order_A // k)
    return Plan(slot_of_assignment, token_of_slot, padded_E, k)


class _ToExperts(torch.autograd.Function):
    """[N, D] -> [P, D]. Both directions are gathers: no scatter-add."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, plan: Plan) -> Tensor:
        ctx.plan = plan
        return x_ND.index_select(0, plan.token_of_slot)

    @staticmethod
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor, None]:
        grad_AD = grad_PD.index_select(0, ctx.plan.slot_of_assignment)
        return grad_AD.unflatten(0, (-1, ctx.plan.k)).sum(1), None


class _FromExperts(torch.autograd.Function):
    """[P, D] -> [A, D], leaving out the padding, which has no gradient."""

    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, plan: Plan) -> Tensor:
        ctx.plan, ctx.slots = plan, len(x_PD)
        return x_PD.index_select(0, plan.slot_of_assignment)

    @staticmethod
    def backward(ctx: Any, grad_AD: Tensor) -> tuple[Tensor, None]:
        grad_PD = grad_AD.new_zeros(ctx.slots, grad_AD.shape[1])
        return grad_PD.index_copy_(0, ctx.plan.slot_of_assignment, grad_AD), None


def looped_product(x_PI: Tensor, weight_EOI: Tensor, plan: Plan) -> Tensor:
    """Each expert's slots times its matrix: [P, I] x [E, O, I] -> [P, O]."""
    counts = plan.counts.tolist()
    # Split and unbound once: the gradients of single slices would each be filled up with zeros to full size.
    groups = list(zip(x_PI.split(counts), weight_EOI.to(x_PI.dtype).unbind(0), strict=True))
    # Without any token the first expert's nothing stands for all: every weight has a gradient, if of zeros.
    return torch.cat([F.linear(group, weight) for group, weight in groups if len(group)] or [F.linear(*groups[0])])


def looped_int8_product(x_PI: Tensor, weight_EOI: Tensor, scale_EO: Tensor, plan: Plan) -> Tensor:
    """The same with int8 weights: of an expert that no token chose nothing is read."""
    groups = list(zip(x_PI.split(plan.counts.tolist()), weight_EOI, scale_EO, strict=True))
    return torch.cat([int8_linear(*group) for group in groups if len(group[0])] or [int8_linear(*groups[0])])


def grouped_product(x_PI: Tensor, weight_EOI: Tensor, plan: Plan) -> Tensor:
    """The same as one kernel; slots behind the last expert's are left undefined."""
    ends_E = plan.counts.cumsum(0).to(torch.int32)
    return F.grouped_mm(x_PI, weight_EOI.to(x_PI.dtype).transpose(1, 2), offs=ends_E)


@cache
def _has_grouped_mm(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether torch multiplies groups in one call here: on a CPU, and in bf16 on CUDA devices from Ampere on."""
    if not hasattr(F, "grouped_mm"):
        return False
    if device.type == "cuda":
        return dtype == torch.bfloat16 and torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    try:  # older versions of torch take only operands that begin at a multiple of 16 bytes
        ends = torch.tensor([1, 2], dtype=torch.int32)
        F.grouped_mm(torch.ones(17, dtype=dtype)[1:].view(2, 8), torch.ones(2, 8, 8, dtype=dtype), offs=ends)
    except RuntimeError:
        return False
    return True
