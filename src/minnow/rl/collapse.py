"""The watch that ends a run whose policy has collapsed, before it spends the night on noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from minnow.training.objective import SourceStopsError


@dataclass(frozen=True, kw_only=True)
class WatchConfig:
    """When a run has collapsed and goes no further; each over `patience` phases in a row."""

    patience: int = 5
    """Phases in a row; 0 turns the watch off."""
    repetition: float = 0.5
    """Repetition (0 to 1) above which the answers are loops."""
    truncated: float = 0.95
    """Share of cut-off answers above which nothing ends any more."""
    entropy: float = 0.005
    """Nats a token below which nothing is tried out any more while answers are still wrong."""


class CollapseError(SourceStopsError):
    """The policy has collapsed; the message says how it shows and what to change."""


REMEDIES = {
    "the answers repeat themselves": (
        "give rewards.repetition a weight, raise the KL coefficient, or lower the learning rate"
    ),
    "nearly every answer is cut off": (
        "raise rollout.max_tokens, give rewards.overlong a weight, or lower the learning rate"
    ),
    "the answers to each prompt all earn the same, so nothing is learnt": (
        "mix in easier prompts, reward partial success, or teach the model more before"
    ),
    "the policy has stopped exploring": (
        "raise algorithm.loss.clip_high or rollout.temperature, or lower the learning rate"
    ),
}
"""What helps against each sign."""


class Watch:
    """Looks at each phase's figures and remembers since when they show signs of a collapse."""

    def __init__(self, config: WatchConfig) -> None:
        self.config = config
        self._phases: dict[str, int] = {}
        """Phases in a row that showed a sign; only those that the newest one shows."""
        self._since: dict[str, int] = {}
        """Updates that were done when the first of them was played."""

    def look(self, figures: Mapping[str, float], updates: int) -> None:
        """Take in a phase that was played after so many updates."""
        seen = _signs(self.config, figures) if self.config.patience else []
        self._phases = {sign: self._phases.get(sign, 0) + 1 for sign in seen}
        self._since = {sign: self._since.get(sign, updates) for sign in seen}

    def check(self) -> None:
        """CollapseError where a sign has shown for `patience` phases in a row."""
        for sign, phases in self._phases.items():
            if phases >= self.config.patience > 0:
                raise CollapseError(f"stopped: for {phases} phases {sign}. What helps: {REMEDIES[sign]}")

    @property
    def since(self) -> int | None:
        """Updates that were done when the oldest of the present signs first showed; None without a sign."""
        return min(self._since.values(), default=None)

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps."""
        return {"phases": dict(self._phases), "since": dict(self._since)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to a checkpoint."""
        self._phases, self._since = dict(state["phases"]), dict(state["since"])


def _signs(config: WatchConfig, figures: Mapping[str, float]) -> list[str]:
    """The signs that a phase shows, of REMEDIES and in their order."""
    shown = (
        figures["repetition"] > config.repetition,
        figures["truncated"] > config.truncated,
        figures["equal_groups"] == 1 and figures["pass@1"] < 1,  # where all is solved, nothing is wrong
        figures["entropy"] < config.entropy and figures["pass@1"] < 0.9,
    )
    return [sign for sign, seen in zip(REMEDIES, shown, strict=True) if seen]
