"""The environments by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from minnow.data.prompts import Prompt
from minnow.rl.environment import Environment, SingleTurn

EnvironmentName = Literal["question"]

ENVIRONMENTS: dict[EnvironmentName, Callable[[Prompt], Environment]] = {"question": SingleTurn}
