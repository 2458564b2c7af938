"""The learning rate over a run, as a factor on each group's peak: a pure function of the step."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from minnow.config import UserError, refuse_unused

OWNERS = {
    "decay_fraction": ("wsd",),
    "decay_shape": ("wsd",),
    "final_fraction": ("wsd", "cosine", "linear", "cosine_restarts"),
    "cycles": ("cosine_restarts",),
}
"""Settings that not every shape has, with those that have them."""


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """Warm-up, then one of five shapes."""

    shape: Literal["wsd", "cosine", "linear", "constant", "cosine_restarts"] = "wsd"
    """wsd: warm-up, stable, decay; cosine and linear fall from the end of the warm-up to the end of the run;
    constant does not fall; cosine_restarts is `cycles` cosines, each from the peak again."""

    warmup_steps: int = 100
    """Steps over which the learning rate rises linearly to its peak; at most half of the run is used."""

    decay_fraction: float = 0.65
    """wsd: share of the run's steps at its end over which the learning rate falls."""

    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd: how it falls: linear, or sqrt for 1 - sqrt(share of the decay done)."""

    final_fraction: float = 0.05
    """Learning rate at the end of the run as a share of the peak; constant has none."""

    cycles: int = 4
    """cosine_restarts: cosines after the warm-up, all of the same length."""

    def __post_init__(self) -> None:
        if self.warmup_steps < 0:
            raise UserError(f"schedule.warmup_steps is {self.warmup_steps}: give 0 or more")
        for name in ("decay_fraction", "final_fraction"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"schedule.{name} is {getattr(self, name)}: give a share from 0 to 1")
        if self.cycles < 1:
            raise UserError(f"schedule.cycles is {self.cycles}: give 1 or more")
        unused = {key: owners for key, owners in OWNERS.items() if self.shape not in owners}
        refuse_unused(
            self,
            {key: f"the shape is {self.shape}, not {' or '.join(owners)}" for key, owners in unused.items()},
            "schedule.",
        )


def learning_rate_factor(config: ScheduleConfig, step: int, total_steps: int) -> float:
    """Give the factor on the peak learning rate for optimizer step `step` = 0 ... total_steps - 1.

    Warm-up takes step s to (s + 1) / warm-up steps, so no step is wasted at 0. The falling shapes reach
    `final_fraction` at step `total_steps`, that is right after the last one, so none is wasted there either
    when it is 0. A warm-up longer than half of the run is cut to that half.

    wsd: Hu et al., MiniCPM, arXiv 2404.06395, its sqrt fall Hägele et al., arXiv 2405.18392; cosine and its restarts:
    Loshchilov and Hutter, arXiv 1608.03983.
    """
    warmup = min(config.warmup_steps, total_steps // 2)
    if step < warmup:
        return (step + 1) / warmup
    after, length = step - warmup, max(total_steps - warmup, 1)  # of the run after the warm-up
    done = min(after / length, 1.0)
    match config.shape:
        case "constant":
            height = 1.0
        case "linear":
            height = 1.0 - done
        case "cosine":
            height = _cosine(done)
        case "cosine_restarts":
            # In whole numbers: done x cycles may come out just below the number at which a cycle starts.
            height = 0.0 if done == 1.0 else _cosine(after * config.cycles % length / length)
        case "wsd":
            height = _stable_then_decay(config, step, warmup, total_steps)
    return config.final_fraction + (1.0 - config.final_fraction) * height


def _cosine(done: float) -> float:
    """Fall from 1 to 0 over half a period."""
    return 0.5 * (1.0 + math.cos(math.pi * done))


def _stable_then_decay(config: ScheduleConfig, step: int, warmup: int, total_steps: int) -> float:
    """Stay at 1, then fall to 0; a decay that would start inside the warm-up starts at its end."""
    start = max(warmup, total_steps - round(config.decay_fraction * total_steps))
    if step < start or start == total_steps:
        return 1.0
    done = min((step - start) / (total_steps - start), 1.0)
    return 1.0 - done if config.decay_shape == "linear" else 1.0 - math.sqrt(done)
