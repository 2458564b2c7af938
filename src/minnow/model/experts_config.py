"""What a user can choose about routed experts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minnow.config import UserError


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    """Routed experts in the place of the MLP: each token goes to a few of many small MLPs."""

    num_experts: int = 8
    """Routed experts in a layer."""
    num_experts_per_tok: int = 2
    """Experts that work on one token (k)."""
    moe_intermediate_size: int
    """Width of one expert's SwiGLU."""
    scoring: Literal["softmax", "sigmoid"] = "softmax"
    """softmax over all experts (Qwen3MoeForCausalLM, no shared experts); sigmoid of each expert's logit and a selection
    bias that keeps the loads even (DeepSeek-V3's router, Glm4MoeForCausalLM, with shared experts)."""
    norm_topk_prob: bool | None = None
    """Divide the chosen experts' weights by their sum. null: only if there are several a token (one alone would
    always weigh 1, and its router would learn nothing from the text)."""
    n_shared_experts: int = 0
    """Experts that work on every token, as one MLP of this many times moe_intermediate_size."""
    first_k_dense_replace: int = 0
    """The first layers, this many of them, keep a dense MLP of intermediate_size."""
    routed_scaling_factor: float = 1.0
    """sigmoid only: factor on the weights of the routed experts."""
    n_group: int = 1
    """sigmoid only: groups of experts; a token's experts come from the topk_group best groups."""
    topk_group: int = 1
    """sigmoid only: groups a token may choose from."""
    noisy: bool = False
    """softmax only: learned noise on the router's logits in training (noisy top-k gating, 1701.06538); left out of the
    saved model."""

    def __post_init__(self) -> None:
        if self.norm_topk_prob is None:
            object.__setattr__(self, "norm_topk_prob", self.num_experts_per_tok > 1)
        for name in ("num_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group"):
            if getattr(self, name) < 1:
                raise UserError(f"model.experts.{name} is {getattr(self, name)}: it must be at least 1")
        if self.n_shared_experts < 0 or self.first_k_dense_replace < 0:
            raise UserError("model.experts.n_shared_experts and first_k_dense_replace must not be negative")
        if self.num_experts_per_tok > self.num_experts:
            raise UserError(
                f"model.experts.num_experts_per_tok ({self.num_experts_per_tok}) is more than num_experts "
                f"({self.num_experts})"
            )
        if self.scoring == "softmax":
            self._check_softmax()
        else:
            self._check_sigmoid()

    @property
    def router_learns(self) -> bool:
        """Whether the language-model loss has a gradient for the router: not if each token's one weight is always 1."""
        return self.num_experts_per_tok > 1 or not self.norm_topk_prob

    def _check_softmax(self) -> None:
        if self.n_shared_experts:
            raise UserError(
                "model.experts.n_shared_experts with scoring softmax (DeepSeek-V2, MiniMind2-MoE) has no Hugging Face "
                "class with grouped-query attention (Qwen2-MoE gates its shared expert, DeepSeek-V2 has another "
                "attention): take scoring sigmoid, or n_shared_experts 0"
            )
        if (self.n_group, self.topk_group, self.routed_scaling_factor) != (1, 1, 1.0):
            raise UserError(
                "model.experts.n_group, topk_group and routed_scaling_factor go with scoring sigmoid only: "
                "Qwen3MoeForCausalLM has none of them"
            )
        if self.noisy and self.num_experts_per_tok > 1 and not self.norm_topk_prob:
            raise UserError("model.experts.noisy takes the softmax over the chosen experts: leave norm_topk_prob on")

    def _check_sigmoid(self) -> None:
        if self.noisy:
            raise UserError(
                "model.experts.noisy goes with scoring softmax: the sigmoid router is kept even by its bias"
            )
        if not self.n_shared_experts:
            raise UserError(
                "model.experts.scoring sigmoid needs n_shared_experts of at least 1: Glm4MoeForCausalLM always has them"
            )
        if self.num_experts % self.n_group or self.num_experts // self.n_group < 2:
            raise UserError(
                f"model.experts.n_group ({self.n_group}) must divide num_experts ({self.num_experts}) into groups of "
                "at least 2: a group's score is the sum of its two best"
            )
        if self.topk_group > self.n_group:
            raise UserError(f"model.experts.topk_group ({self.topk_group}) is more than n_group ({self.n_group})")
        if self.num_experts_per_tok > self.topk_group * (self.num_experts // self.n_group):
            raise UserError(
                f"model.experts.num_experts_per_tok ({self.num_experts_per_tok}) is more than {self.topk_group} groups "
                f"of {self.num_experts // self.n_group} experts hold"
            )
