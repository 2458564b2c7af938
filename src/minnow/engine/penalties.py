"""Penalties on tokens that were seen, kept up to date token by token."""

from __future__ import annotations

import torch
from torch import Tensor

from minnow.engine.sampling import SamplingParams


class Penalties:
    """What one sequence has seen: in prompt and answer [V], and how often in the answer [V]."""

    def __init__(self, params: SamplingParams, prompt_ids: list[int], vocab_size: int, device: torch.device):
        self._params = params
        self._seen_V = torch.zeros(vocab_size, dtype=torch.bool, device=device)
        self._seen_V[torch.tensor(prompt_ids, device=device)] = True
        self._counts_V = torch.zeros(vocab_size, device=device)
        self._read = 0

    def apply(self, logits_V: Tensor, answer: list[int]) -> None:
        """Change the logits in place, after `answer`: repetition as in CTRL (arXiv 1909.05858), over prompt and answer;
        presence and frequency over the answer."""
        for token in answer[self._read :]:
            self._seen_V[token] = True
            self._counts_V[token] += 1
        self._read = len(answer)
        params = self._params
        if params.repetition_penalty != 1:
            # Dividing a negative logit would make the token likelier.
            factor = params.repetition_penalty
            penalised = torch.where(logits_V > 0, logits_V / factor, logits_V * factor)
            torch.where(self._seen_V, penalised, logits_V, out=logits_V)
        if params.presence_penalty:
            logits_V.sub_((self._counts_V > 0).float(), alpha=params.presence_penalty)
        if params.frequency_penalty:
            logits_V.sub_(self._counts_V, alpha=params.frequency_penalty)
