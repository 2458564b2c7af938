"""From a model to its optimizers, their learning rates during a run, and their state by parameter name."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from minnow.config import UserError
from minnow.optim.config import OptimConfig
from minnow.optim.muon import Muon

Kind = Literal["matrix", "embedding", "norm", "router", "other"]

MATRIX_NAMES = frozenset(
    {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "lora_A", "lora_B"}
    | {"out_proj", "fc1", "fc2"}  # a vision tower's
)
ROUTER_NAMES = ("mlp.gate.weight", "mlp.gate.noise_weight")
EMBEDDING_NAMES = frozenset({"embed_tokens", "lm_head"})


def kind_of(name: str, parameter: Tensor) -> Kind:
    """Sort a parameter by name and dimensions.

    - "matrix": q, k, v, o, gate, up, down, also stacked [experts, out, in], a vision tower's, and the matrices of LoRA;
    - "embedding": token embedding and head;
    - "norm": everything of one dimension (norm gains and biases);
    - "router": what chooses a token's experts;
    - "other": the rest (what a tower begins with, and the projector behind it).
    """
    if parameter.ndim <= 1:
        return "norm"
    parts = name.split(".")
    owner = parts[-2] if parts[-1] == "weight" and len(parts) > 1 else parts[-1]
    if owner in MATRIX_NAMES and parameter.ndim in (2, 3):
        return "matrix"
    if owner in EMBEDDING_NAMES:
        return "embedding"
    return "router" if name.endswith(ROUTER_NAMES) else "other"


def parameter_groups(model: nn.Module) -> dict[Kind, list[tuple[str, nn.Parameter]]]:
    """Sort a model's trainable parameters by `kind_of`, in the model's order; tied ones come once."""
    groups: dict[Kind, list[tuple[str, nn.Parameter]]] = {
        "matrix": [],
        "embedding": [],
        "norm": [],
        "router": [],
        "other": [],
    }
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups[kind_of(name, parameter)].append((name, parameter))
    return groups


def build_optimizers(
    model: nn.Module,
    config: OptimConfig,
    *,
    tokens_per_batch: int,
    trained: bool = False,
    fresh: Sequence[str] = (),
) -> list[Optimizer]:
    """Give [Muon, AdamW] or [AdamW] over the trainable parameters, without those that would have none.

    Every group has `kind`, `base_lr` (its peak learning rate, for `set_learning_rates`) and torch's
    `param_names`. `tokens_per_batch` counts all ranks and micro-batches and matters only with
    `reference_batch_tokens`. `trained`: the model has learnt already (see `OptimConfig.learning_rates`), but for the
    parameters whose names begin with one of `fresh`.
    """
    groups: list[dict[str, Any]] = []
    for kind, parameters in parameter_groups(model).items():
        for is_fresh in (False, True):
            chosen = [(name, weight) for name, weight in parameters if name.startswith(tuple(fresh)) == is_fresh]
            if not chosen:
                continue
            rate = _rates(config, tokens_per_batch, trained=trained and not is_fresh)[kind]
            decay = config.weight_decay if kind in ("matrix", "router", "other") else 0.0
            groups.append({"params": chosen, "kind": kind, "lr": rate, "base_lr": rate, "weight_decay": decay})
    matrices = [group for group in groups if group["kind"] == "matrix"]
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon" and matrices:
        groups = [group for group in groups if group["kind"] != "matrix"]
        muon = Muon(
            matrices,
            momentum=config.momentum,
            momentum_start=config.momentum_start,
            momentum_warmup_steps=config.momentum_warmup_steps,
            polynomial=config.polynomial,
            newton_schulz_steps=config.newton_schulz_steps,
            update_scale=config.update_scale,
        )
        optimizers.append(muon)
    if groups:
        devices = {p.device.type for group in groups for _, p in group["params"]}
        fused = devices <= {"cpu", "cuda", "mps", "xpu"}
        optimizers.append(AdamW(groups, betas=config.betas, eps=config.eps, fused=fused))
    return optimizers


def _rates(config: OptimConfig, tokens_per_batch: int, *, trained: bool) -> dict[Kind, float]:
    """The peak learning rate of each kind of parameter."""
    matrix_lr, embedding_lr, norm_lr, router_lr = config.learning_rates(tokens_per_batch, trained=trained)
    return {
        "matrix": matrix_lr,
        "embedding": embedding_lr,
        "norm": norm_lr,
        "router": router_lr,
        "other": embedding_lr,
    }


def set_learning_rates(optimizers: Sequence[Optimizer], factor: float) -> None:
    """Set every group's learning rate to its peak times the schedule's factor."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * factor


def named_state(optimizers: Sequence[Optimizer]) -> dict[str, dict[str, Tensor]]:
    """Give the optimizers' state by parameter name, as live tensors: write or copy before the next step.

    Parameters that have not been updated yet are left out.
    """
    state: dict[str, dict[str, Tensor]] = {}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for name, parameter in zip(group["param_names"], group["params"], strict=True):
                if parameter in optimizer.state:
                    state[name] = dict(optimizer.state[parameter])
    return state


def load_named_state(optimizers: Sequence[Optimizer], state: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Give the optimizers a state from `named_state`; the hyper-parameters stay those of the current config.

    Tensors already of the right device and dtype are taken over, not copied. Raises UserError when the state
    belongs to parameters these optimizers do not have (another model, or another optimizer on the same one).
    """
    known = {name for optimizer in optimizers for group in optimizer.param_groups for name in group["param_names"]}
    unknown = sorted(set(state) - known)
    if unknown:
        raise UserError(
            f"the checkpoint has optimizer state for {unknown[0]} ({len(unknown)} such), which this model "
            "does not train: resume with the model and optim settings of the run"
        )
    for optimizer in optimizers:
        current = optimizer.state_dict()
        names = [name for group in current["param_groups"] for name in group["param_names"]]
        current["state"] = {index: dict(state[name]) for index, name in enumerate(names) if name in state}
        expected = "momentum_buffer" if isinstance(optimizer, Muon) else "exp_avg"
        for index, entries in current["state"].items():
            if expected not in entries:
                raise UserError(
                    f"the checkpoint's optimizer state of {names[index]} has no {expected}: "
                    "resume with the run's optim.optimizer"
                )
        optimizer.load_state_dict(current)
