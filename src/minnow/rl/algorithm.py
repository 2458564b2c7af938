"""Which advantage, and how a phase of rollouts is used: the settings that make PPO, GRPO, SPO ... of one framework."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Literal

from minnow.config import UserError, refuse_unused
from minnow.objectives.policy import KLEstimator, PolicyLossConfig, RatioLevel

AdvantageKind = Literal["group", "group_centred", "leave_one_out", "batch", "tracker", "gae"]


@dataclass(frozen=True, kw_only=True)
class CriticConfig:
    """PPO's critic: a model of its own with one number a token."""

    init_from: str | None = None
    """Model to start from, usually a reward model; by default the policy's, with a fresh head."""
    learning_rate: float = 1e-4
    """Of its AdamW; the policy has its own."""
    gamma: float = 1.0
    """Discount of a later reward, a token."""
    lam: float = 0.95
    """lambda of the generalised advantage: 1 trusts the rewards, 0 the critic."""
    value_clip: float | None = 0.2
    """How far a value may move from the old one in a phase before its error counts in full; null: no bound."""
    warmup_phases: int = 4
    """Phases of rollouts on which only the critic learns, before the policy's first update."""

    def __post_init__(self) -> None:
        for name in ("gamma", "lam"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"algorithm.critic.{name} is {getattr(self, name)}: it must be from 0 to 1")
        if self.value_clip is not None and self.value_clip <= 0:
            raise UserError(
                f"algorithm.critic.value_clip is {self.value_clip}: it must be positive, or null for no bound"
            )
        if self.warmup_phases < 0:
            raise UserError(f"algorithm.critic.warmup_phases is {self.warmup_phases}: it must be 0 or more")


@dataclass(frozen=True, kw_only=True)
class AlgorithmConfig:
    """A policy-optimisation algorithm as choices. The presets set these."""

    advantage: AdvantageKind = "group"
    """group: reward minus the group's mean, over its deviation (GRPO); group_centred: without the deviation (Dr. GRPO);
    leave_one_out (RLOO); batch: reward, whitened over the batch's tokens (REINFORCE++); tracker: reward minus the
    prompt's remembered value, whitened (SPO); gae: a critic's generalised advantage, whitened (PPO)."""
    loss: PolicyLossConfig = field(default_factory=PolicyLossConfig)
    """Ratio term, aggregation, KL term of the loss."""
    epochs: int = 1
    """Passes over each phase's answers."""
    minibatches: int = 1
    """Updates of one pass; above 1 the later ones are off-policy and the ratio matters."""
    target_kl: float | None = None
    """Leave an update out where its answers show that those before it in the phase have taken the policy farther than
    this from the one that played (`kl_old`, nats a token; 0.01 to 0.05 is usual); null: no bound."""
    kl_reward_coef: float = 0.0
    """Weight of the KL divergence to the reference, taken off the reward: a token pays for itself and those after
    it with gae and batch, else for the whole answer."""
    kl_reward_estimator: KLEstimator = "k1"
    """Its estimator; k1 is unbiased and right inside a reward."""
    measure_kl: bool = False
    """Measure the KL divergence to the reference (`kl_to_reference`) even where no KL term needs it. Costs a forward
    pass over each phase's answers, and a second model in memory (none with adapters)."""
    drop_equal_groups: bool = False
    """Leave out groups whose rewards are all equal and draw other prompts instead (DAPO's dynamic sampling)."""
    max_redraws: int = 3
    """Rounds of drawing other prompts, at most; a prompt is asked once a phase."""
    drop_truncated: bool = False
    """Give answers that were cut off no loss (DAPO's overlong filtering)."""
    correction_cap: float | None = 2.0
    """Largest weight policy / sampler of a token, where the sampler is not quite the policy; null: no correction."""
    correction_level: RatioLevel = "token"
    """Whether a token's weight is its own or its answer's."""
    curriculum: bool = False
    """Remember how often each prompt was answered right, and ask more often what is neither always nor never right.
    Needs rewards from 0 to 1. SPO's tracker always does."""
    tracker_answers: int = 0
    """Only with a tracker (SPO's, or a curriculum): answers to *every* prompt before the first phase, from which its
    value starts (SPO's paper draws 8); 0 starts at one half, and learns on the way."""
    critic: CriticConfig = field(default_factory=CriticConfig)
    """Only with `advantage: gae`."""

    def __post_init__(self) -> None:
        for name in ("tracker_answers", "max_redraws", "kl_reward_coef"):
            if getattr(self, name) < 0:
                raise UserError(f"algorithm.{name} is {getattr(self, name)}: it must be 0 or more")
        if self.correction_cap is not None and self.correction_cap <= 0:
            raise UserError(
                f"algorithm.correction_cap is {self.correction_cap}: every token would weigh nothing; it must be "
                "positive, or null for no correction"
            )
        for name in ("epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise UserError(f"algorithm.{name} is {getattr(self, name)}: it must be at least 1")
        if self.target_kl is not None and self.target_kl <= 0:
            raise UserError(f"algorithm.target_kl is {self.target_kl}: it must be positive, or null for no bound")
        refuse_unused(self, self._unused(), "algorithm.")

    def _unused(self) -> dict[str, str]:
        """Settings of what was not chosen."""
        unused: dict[str, str] = {}
        if self.advantage != "gae":
            critic = f"the advantage is {self.advantage}, and only gae has a critic"
            unused |= {f"critic.{each.name}": critic for each in fields(CriticConfig)}
        if not self.tracks_prompts:
            unused["tracker_answers"] = "it belongs to advantage tracker and to algorithm.curriculum"
        if not self.drop_equal_groups:
            unused["max_redraws"] = "algorithm.drop_equal_groups is false"
        if not self.kl_reward_coef:
            unused["kl_reward_estimator"] = "algorithm.kl_reward_coef is 0"
        if self.correction_cap is None:
            unused["correction_level"] = "algorithm.correction_cap is null"
        if self.updates_per_phase == 1:
            unused["target_kl"] = "the only update of a phase is of the policy that played"
        return unused

    @property
    def needs_reference(self) -> bool:
        """Whether the reference model's log-probabilities are used."""
        return self.loss.kl_coef > 0 or self.kl_reward_coef > 0 or self.measure_kl

    @property
    def tracks_prompts(self) -> bool:
        """Whether it is remembered what each prompt is worth."""
        return self.curriculum or self.advantage == "tracker"

    @property
    def updates_per_phase(self) -> int:
        """Optimizer updates for each phase of rollouts."""
        return self.epochs * self.minibatches

    def check_samples(self, samples: int) -> None:
        """UserError when something needs groups and there are none."""
        by_group = self.advantage in ("group", "group_centred", "leave_one_out")
        if (by_group or self.drop_equal_groups) and samples < 2:
            what = f"advantage {self.advantage}" if by_group else "drop_equal_groups"
            raise UserError(
                f"rollout.samples is {samples}, but algorithm.{what} compares the answers to one prompt: give at "
                "least 2"
            )
