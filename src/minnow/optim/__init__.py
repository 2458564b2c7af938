"""Optimizers and learning-rate schedules."""

from minnow.optim.build import (
    build_optimizers,
    kind_of,
    load_named_state,
    named_state,
    parameter_groups,
    set_learning_rates,
)
from minnow.optim.config import OptimConfig
from minnow.optim.muon import Muon
from minnow.optim.newton_schulz import orthogonalise
from minnow.optim.schedule import ScheduleConfig, learning_rate_factor

__all__ = [
    "Muon",
    "OptimConfig",
    "ScheduleConfig",
    "build_optimizers",
    "kind_of",
    "learning_rate_factor",
    "load_named_state",
    "named_state",
    "orthogonalise",
    "parameter_groups",
    "set_learning_rates",
]
