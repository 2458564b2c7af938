"""Batched generation: one engine for chat, evaluation, the server and rollouts."""

from minnow.engine.engine import Engine
from minnow.engine.outputs import Completion, Completions, Delta, FinishReason, PromptLogprobs, TopLogprobs, Usage
from minnow.engine.prompt import Prompt
from minnow.engine.sampling import SamplingOptions, SamplingParams

__all__ = [
    "Completion",
    "Completions",
    "Delta",
    "Engine",
    "FinishReason",
    "Prompt",
    "PromptLogprobs",
    "SamplingOptions",
    "SamplingParams",
    "TopLogprobs",
    "Usage",
]
