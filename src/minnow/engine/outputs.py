"""What the engine hands back."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

FinishReason = Literal["stop", "length"]
"""`stop`: an end token or a stop string; `length`: max_tokens or the end of the context."""


TopLogprobs = list[tuple[int, float]]
"""The likeliest tokens with their log-probabilities under the softmax of the model's own logits, best first."""


@dataclass(frozen=True, kw_only=True)
class PromptLogprobs:
    """How likely the model found the tokens of a prompt, under the softmax of its own logits.

    An item for each token of the prompt. Nothing stands before the first one: its items are None.
    """

    logprobs: list[float | None]
    top_logprobs: list[TopLogprobs | None] | None
    """Lists of `SamplingParams.prompt_logprobs` tokens; None if that is 0."""


@dataclass(frozen=True, kw_only=True)
class Usage:
    """What a request took."""

    prompt_tokens: int
    cached_tokens: int
    """Of the prompt's tokens: found in the cache and not computed again."""
    completion_tokens: int
    """Of all samples together."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One sample's answer."""

    ids: list[int]
    """Every generated token, the one that ended the answer included."""
    text: str
    """The ids as text: without control tokens, cut before the stop string, whole characters only."""
    finish_reason: FinishReason
    logprobs: list[float] | None
    """One per id, under the distribution it was sampled from (a greedy choice is certain: 0); None if not
    asked for."""
    raw_logprobs: list[float] | None
    """One per id, under the softmax of the model's own logits; None if not asked for."""
    top_logprobs: list[TopLogprobs] | None = None
    """One list per id, `SamplingParams.top_logprobs` long; None if not asked for."""


@dataclass(frozen=True, kw_only=True)
class Completions:
    """The answers to one prompt."""

    prompt_ids: list[int]
    completions: tuple[Completion, ...]
    """`SamplingParams.n` of them, in the order of their sample index."""
    seed: int
    """The seed used, also where none was asked for: the same one gives the same answers."""
    prompt_logprobs: PromptLogprobs | None = None
    """None if not asked for."""


@dataclass(frozen=True, kw_only=True)
class Delta:
    """One sample's next token, and the text that became certain with it.

    The texts of a sample's deltas, joined, are its `Completion.text`; likewise ids and log-probabilities.
    """

    index: int
    """Which of the `n` samples."""
    id: int
    text: str
    """May be empty: half a character, or what might become a stop string, is held back."""
    finish_reason: FinishReason | None
    """None until the sample's last delta."""
    logprob: float | None
    """Under the distribution it was sampled from; None if not asked for."""
    raw_logprob: float | None
    """Under the softmax of the model's own logits; None if not asked for."""
    top_logprobs: TopLogprobs | None
    """None if not asked for."""
    prompt_logprobs: PromptLogprobs | None
    """On the request's first delta, if asked for; else None."""
    cached_tokens: int | None
    """Of the prompt's tokens: found in the cache. On the request's first delta; else None."""
    usage: Usage | None
    """On the request's last delta, which ends the last of its samples; else None."""
