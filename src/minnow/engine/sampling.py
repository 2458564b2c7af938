"""What a caller asks of the sampler, and the checks of it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from minnow.config import UserError

_GREEDY_BELOW = 1e-5
"""Clients that mean "greedy" send 1e-8; logits divided by so little overflow."""


@dataclass(frozen=True, kw_only=True)
class SamplingOptions:
    """The options that a person sets on a command line; `SamplingParams` adds those that programs set."""

    temperature: float = 1.0
    """Divides the logits; 0 (and anything below 0.00001) takes the likeliest token every time."""
    top_k: int = 0
    """Sample among the k likeliest tokens only; 0 turns it off."""
    top_p: float = 1.0
    """Sample among the fewest likeliest tokens that hold this probability together (nucleus sampling); 1
    turns it off."""
    min_p: float = 0.0
    """Leave out tokens less likely than this fraction of the likeliest token's probability; 0 turns it
    off."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens in the prompt or the answer; 1 turns it
    off."""
    presence_penalty: float = 0.0
    """Taken off the logit of every token that the answer already holds."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token once for each time the answer already holds it."""
    max_tokens: int | None = 256
    """Most tokens to generate; null means until the context is full."""
    seed: int | None = None
    """Makes the samples repeatable; null draws a fresh seed."""

    def __post_init__(self) -> None:
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 (greedy) or a positive number")
        if self.temperature < _GREEDY_BELOW:
            object.__setattr__(self, "temperature", 0.0)
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or a positive whole number")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "between 0 and 1")
        # A denormal penalty would make logits infinite, and their softmax NaN.
        _require(
            0.01 <= self.repetition_penalty <= 100,
            "repetition_penalty",
            self.repetition_penalty,
            "between 0.01 and 100",
        )
        # Far more than any logit; infinity times a count of 0 is no number.
        for name in ("presence_penalty", "frequency_penalty"):
            _require(-100 <= getattr(self, name) <= 100, name, getattr(self, name), "between -100 and 100")
        _require(self.max_tokens is None or self.max_tokens >= 1, "max_tokens", self.max_tokens, "at least 1")
        _require(self.seed is None or 0 <= self.seed < 2**64, "seed", self.seed, "between 0 and 2**64 - 1")

    def sampling_params(self, **more: Any) -> SamplingParams:
        """The same options as `SamplingParams`, with `more` of its fields."""
        options = {f.name: getattr(self, f.name) for f in fields(SamplingOptions)}
        return SamplingParams(**{**options, **more})


@dataclass(frozen=True, kw_only=True)
class SamplingParams(SamplingOptions):
    """How to continue one prompt.

    The sampling distribution is: logits -> penalties -> logit_bias -> end tokens barred before `min_tokens`
    -> tokens that the grammar bars
    -> temperature -> top_k -> top_p -> min_p, in transformers' order. Random numbers depend on the seed, the
    sample's index and the token's index only, so an answer does not depend on what else is in the batch;
    equal prompts with equal seeds give equal answers.
    """

    adapter: str | None = None
    """Name of the engine's adapter that answers; None: the model itself."""
    n: int = 1
    """Samples for the prompt; they share one prefill."""
    stop: Sequence[str] = ()
    """Strings that end the answer; neither they nor what follows are part of its text."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the answer, besides the end-of-text and end-of-turn tokens."""
    min_tokens: int = 0
    """Tokens to generate before the answer may end."""
    ignore_eos: bool = False
    """Go on after end-of-text and end-of-turn tokens."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    grammar: str | None = None
    """The answer obeys this grammar (see `minnow.engine.grammar`) and ends where nothing can follow."""
    logprobs: bool = False
    """Return the log-probability of every generated token, under the sampling distribution and under the
    raw one."""
    top_logprobs: int = 0
    """Return this many of the likeliest tokens, with their raw log-probabilities, at every place."""
    prompt_logprobs: int | None = None
    """Return the raw log-probability of every token of the prompt too, and this many of the likeliest tokens in its
    place. The whole prompt is read for it: what the cache holds of it is not used. Such a prompt may fill the context:
    one token is drawn behind it all the same. None: do not."""
    skip_special_tokens: bool = True
    """Leave control tokens out of the text (they are always in the ids)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.stop, str):  # a string is a sequence too, of one-character stops nobody meant
            object.__setattr__(self, "stop", (self.stop,))
        _require(self.n >= 1, "n", self.n, "at least 1")
        _require(self.top_logprobs >= 0, "top_logprobs", self.top_logprobs, "0 or more")
        _require(
            self.prompt_logprobs is None or self.prompt_logprobs >= 0,
            "prompt_logprobs",
            self.prompt_logprobs,
            "0 or more",
        )
        _require(self.min_tokens >= 0, "min_tokens", self.min_tokens, "0 or more")
        _require(
            self.max_tokens is None or self.min_tokens <= self.max_tokens,
            "min_tokens",
            self.min_tokens,
            f"at most max_tokens ({self.max_tokens})",
        )
        _require(all(map(math.isfinite, self.logit_bias.values())), "logit_bias", self.logit_bias, "finite numbers")
        if self.grammar is not None and (self.min_tokens or self.ignore_eos):
            raise UserError("an answer with a grammar ends where the grammar does: leave out min_tokens and ignore_eos")
        _require(all(self.stop), "stop", list(self.stop), "strings of at least one character")

    @property
    def has_penalties(self) -> bool:
        """Whether tokens seen so far change the logits."""
        return self.repetition_penalty != 1 or self.presence_penalty != 0 or self.frequency_penalty != 0


def _require(holds: bool, name: str, value: object, allowed: str) -> None:
    if not holds:
        raise UserError(f"{name} is {value}, but must be {allowed}")
