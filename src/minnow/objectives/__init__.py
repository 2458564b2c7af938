"""Losses: pure functions on tensors."""

from minnow.objectives.lm import LinearCrossEntropy, bits_per_byte, linear_cross_entropy, token_logprobs

__all__ = ["LinearCrossEntropy", "bits_per_byte", "linear_cross_entropy", "token_logprobs"]
