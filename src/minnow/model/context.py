"""A longer context for a trained model: the same weights under other rotary frequencies."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Literal

from minnow.config import UserError
from minnow.model.config import ModelConfig, RopeScaling


@dataclass(frozen=True, kw_only=True)
class ContextConfig:
    """What the commands that can stretch a model's context share."""

    rope_scaling: Literal["yarn", "linear", "ntk"] | None = None
    """Read texts longer than the model was trained on. yarn (2309.00071) stretches the slow rotary frequencies only,
    linear (2306.15595) all of them alike, ntk takes a greater base instead."""
    factor: float | None = None
    """With rope_scaling: new length over trained length. Default: 4; in training, sequence_length over it."""

    def extend(self, config: ModelConfig, *, factor: float = 4.0) -> ModelConfig:
        """The shape with its context stretched, by `factor` where the user gave none; the same without
        rope_scaling. UserError for a factor without it, and as in `extend_context`."""
        if self.rope_scaling is None:
            if self.factor is not None:
                raise UserError(f"--factor {self.factor:g} needs --rope-scaling yarn (or linear, or ntk)")
            return config
        return extend_context(config, self.rope_scaling, factor if self.factor is None else self.factor)

    def reach(self, config: ModelConfig) -> int | None:
        """Tokens of the longest rows to train on; None where their length says how far to stretch."""
        if self.rope_scaling is not None and self.factor is None:
            return None
        return self.extend(config).max_position_embeddings

    def extend_for(self, config: ModelConfig, sequence_length: int) -> ModelConfig:
        """The shape for training on rows of `sequence_length`; UserError where they are too long for it, or too short
        to say how far to stretch."""
        trained = config.max_position_embeddings
        if self.rope_scaling is not None and self.factor is None and sequence_length <= trained:
            raise UserError(
                f"--sequence-length {sequence_length}: the model reads {trained} tokens as it is; give the greater "
                "length that it is to learn, or leave --rope-scaling out"
            )
        extended = self.extend(config, factor=sequence_length / trained)
        extended.check_training_rows(sequence_length)
        return extended


AS_TRAINED = ContextConfig()
"""The context as it is."""


def extend_context(config: ModelConfig, kind: Literal["yarn", "linear", "ntk"], factor: float) -> ModelConfig:
    """The shape for sequences up to `factor` times the trained length.

    NTK-aware scaling is a plain model with a greater base: theta' = theta factor^(d / (d - 2)), so that the slowest
    frequency is divided by `factor` and the fastest is left alone. That is what transformers' type "dynamic" computes
    for a sequence of the new length; being no type of its own, every reader of the saved model knows it.

    Raises UserError for a model whose frequencies are already stretched, and for a factor below 1.
    """
    if config.rope_scaling is not None:
        raise UserError(
            f"the model has rope_scaling {config.rope_scaling.type} by {config.rope_scaling.factor:g} already "
            f"(max_position_embeddings {config.max_position_embeddings}): it cannot be stretched twice"
        )
    if not 1.0 <= factor < math.inf:
        raise UserError(f"--factor {factor:g}: it is new length / trained length, so at least 1")
    trained = config.max_position_embeddings
    longest = round(trained * factor)
    if kind == "ntk":
        if config.head_dim < 4:
            raise UserError("--rope-scaling ntk needs a head_dim of at least 4")
        theta = config.rope_theta * factor ** (config.head_dim / (config.head_dim - 2))
        return dataclasses.replace(config, rope_theta=theta, max_position_embeddings=longest)
    # Of whole tokens: transformers 4 takes the ratio of the two lengths, 5 the factor, and both are to be right.
    factor = longest / trained
    scaling = RopeScaling(
        type=kind,
        factor=factor,
        original_max_position_embeddings=trained,
        attention_factor=yarn_attention_factor(factor) if kind == "yarn" else 1.0,
    )
    return dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=longest)


def yarn_attention_factor(factor: float) -> float:
    """0.1 ln(factor) + 1 on cosines and sines: the logits' temperature that the paper fitted (2309.00071, 3.4)."""
    return 0.1 * math.log(factor) + 1.0
