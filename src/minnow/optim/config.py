"""What a user can choose about the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from minnow.config import UserError, refuse_unused
from minnow.optim.muon import UpdateScale
from minnow.optim.newton_schulz import Polynomial

OF_MUON = (
    "momentum",
    "momentum_start",
    "momentum_warmup_steps",
    "polynomial",
    "newton_schulz_steps",
    "update_scale",
)
"""Settings that AdamW does not have."""
OF_A_TRAINED_MODEL = 0.2
"""Default learning rates of a model that is trained further, as a share of a new one's: it is to be steered."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """Muon on the matrices of attention and feed-forward with AdamW on the rest, or AdamW on everything."""

    optimizer: Literal["muon", "adamw"] = "muon"
    """muon: Muon for the q, k, v, o, gate, up and down matrices, AdamW for the rest; adamw: AdamW for all."""

    matrix_lr: float | None = None
    """Peak learning rate of those matrices. null: 0.01 with muon, 0.002 with adamw or update_scale match_rms_adamw;
    where training starts from a trained model, and not with adapters, a fifth of it, 0.002 and 0.0004 (but for the
    modules that minnow vlm gives it: they are new)."""

    embedding_lr: float | None = None
    """Peak learning rate (AdamW) of embeddings, head and other matrices, such as a projector's. null: 0.004 with muon
    (from a trained model 0.0008), matrix_lr with adamw."""

    norm_lr: float | None = None
    """Peak learning rate (AdamW) of norm gains and biases. null: 0.005 with muon (from a trained model 0.001),
    matrix_lr with adamw."""

    router_lr: float | None = None
    """Peak learning rate (AdamW) of the routers of a mixture of experts. null: 0.001 with muon (from a trained model
    0.0002), matrix_lr with adamw."""

    reference_batch_tokens: int | None = None
    """Tokens a batch for which the learning rates are meant; those used are sqrt(tokens a batch / this) times
    as large (answers of a model in training count at their longest). null: they are used as written."""

    weight_decay: float = 0.05
    """Decoupled weight decay: each step shrinks a weight by its learning rate times this. Never on norms,
    biases and embeddings."""

    betas: tuple[float, float] = (0.8, 0.95)
    """AdamW's decay rates of the first and second moment."""

    eps: float = 1e-10
    """AdamW's addend in the denominator."""

    momentum: float = 0.95
    """Muon's Nesterov momentum after its warm-up."""

    momentum_start: float = 0.85
    """Muon's momentum at the first step."""

    momentum_warmup_steps: int = 300
    """Steps over which Muon's momentum rises linearly; 0: none."""

    polynomial: Polynomial = "polar_express"
    """Muon's iteration: polar_express (a polynomial per step, closer to orthogonal) or quintic (one for all
    steps)."""

    newton_schulz_steps: int = 5
    """Steps of Muon's iteration."""

    update_scale: UpdateScale = "original"
    """Muon's factor on an update: original, sqrt(max(1, out / in)); match_rms_adamw, 0.2 sqrt(max(out, in)),
    which takes AdamW's learning rates (1e-3 to 3e-3, and their default)."""

    def __post_init__(self) -> None:
        for name in ("matrix_lr", "embedding_lr", "norm_lr", "router_lr"):
            rate = getattr(self, name)
            if rate is not None and not rate >= 0:
                raise UserError(f"optim.{name} is {rate}: give a learning rate of 0 or more")
        if self.reference_batch_tokens is not None and self.reference_batch_tokens < 1:
            raise UserError(f"optim.reference_batch_tokens is {self.reference_batch_tokens}: give 1 or more")
        if not self.weight_decay >= 0:
            raise UserError(f"optim.weight_decay is {self.weight_decay}: give 0 or more")
        if not self.eps > 0:
            raise UserError(f"optim.eps is {self.eps}: give more than 0")
        if not all(0 <= beta < 1 for beta in (*self.betas, self.momentum, self.momentum_start)):
            raise UserError("optim.betas, optim.momentum and optim.momentum_start lie from 0 to below 1")
        if self.newton_schulz_steps < 1:
            raise UserError(f"optim.newton_schulz_steps is {self.newton_schulz_steps}: give 1 or more")
        if self.momentum_warmup_steps < 0:
            raise UserError(f"optim.momentum_warmup_steps is {self.momentum_warmup_steps}: give 0 or more")
        if self.optimizer != "muon":
            refuse_unused(self, dict.fromkeys(OF_MUON, f"the optimizer is {self.optimizer}, not muon"), "optim.")

    def learning_rates(self, tokens_per_batch: int, *, trained: bool) -> tuple[float, float, float, float]:
        """Give the peak learning rates of (matrices, embeddings, norms, routers) for a batch of that many tokens.

        trained: the model has learnt already; what is null is then a fifth of what makes a new one.
        """
        share = OF_A_TRAINED_MODEL if trained else 1.0
        adamw_sized = self.optimizer == "adamw" or self.update_scale == "match_rms_adamw"
        matrix_lr = (0.002 if adamw_sized else 0.01) * share
        if self.optimizer == "muon":
            defaults = (matrix_lr, 0.004 * share, 0.005 * share, 0.001 * share)
        else:
            matrix_lr = matrix_lr if self.matrix_lr is None else self.matrix_lr
            defaults = (matrix_lr, matrix_lr, matrix_lr, matrix_lr)
        chosen = (self.matrix_lr, self.embedding_lr, self.norm_lr, self.router_lr)
        factor = 1.0
        if self.reference_batch_tokens is not None:
            factor = (tokens_per_batch / self.reference_batch_tokens) ** 0.5
        matrix, embedding, norm, router = (
            factor * (default if rate is None else rate) for rate, default in zip(chosen, defaults, strict=True)
        )
        return matrix, embedding, norm, router
