"""From logits to the next token of every row, for rows with different wishes in one batch."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import torch
from torch import Tensor

from minnow.engine.counter_random import uniforms
from minnow.engine.outputs import TopLogprobs
from minnow.engine.sampling import SamplingParams
from minnow.engine.sequence import Sequence

CANDIDATES = 256
"""Likeliest tokens looked at for top-p before the whole vocabulary is sorted, which is slow."""


@dataclass(frozen=True)
class Sampled:
    """The next tokens of B rows; log-probabilities only where a row asks for them."""

    ids: list[int]
    logprobs: list[float] | None
    raw_logprobs: list[float] | None
    top_logprobs: list[TopLogprobs] | None

    def logprobs_of(self, row: int, params: SamplingParams) -> tuple[float | None, float | None, TopLogprobs | None]:
        """What a row asked for of (sampling, raw, top) log-probabilities; None for the rest."""
        chosen: tuple[float | None, float | None] = (None, None)
        if params.logprobs:
            assert self.logprobs is not None
            assert self.raw_logprobs is not None
            chosen = self.logprobs[row], self.raw_logprobs[row]
        return *chosen, self.top_logprobs[row][
            : params.top_logprobs
        ] if self.top_logprobs and params.top_logprobs else None


def sample(logits_BV: Tensor, rows: Rows[Sequence]) -> Sampled:
    """Draw each row's next token from its own sampling distribution.

    logits_BV: float32, any device; not changed. A row's token depends on its logits, its parameters, its
    tokens so far and its random stream only.
    """
    adjusted_BV = adjust(logits_BV, rows)
    greedy_B = adjusted_BV.argmax(-1)
    sampling_logprobs_BV = None
    if any(row.params.temperature > 0 for row in rows):
        sampling_logprobs_BV = sampling_distribution(adjusted_BV, rows)
        drawn_B = draw(sampling_logprobs_BV, rows)
        random_B = torch.tensor([row.params.temperature > 0 for row in rows], device=logits_BV.device)
        ids_B = torch.where(random_B, drawn_B, greedy_B)
    else:
        ids_B = greedy_B
    ids = ids_B.tolist()
    top = max(row.params.top_logprobs for row in rows)
    if not top and not any(row.params.logprobs for row in rows):
        return Sampled(ids, None, None, None)
    raw_BV = torch.log_softmax(logits_BV, -1)
    raw_B = raw_BV.gather(1, ids_B[:, None])[:, 0]
    likeliest = likeliest_tokens(raw_BV, top) if top else None
    if sampling_logprobs_BV is None:
        logprobs = [0.0] * len(ids)  # a greedy choice is certain
    else:
        logprobs = torch.where(random_B, sampling_logprobs_BV.gather(1, ids_B[:, None])[:, 0], 0.0).tolist()
    return Sampled(ids, logprobs, raw_B.tolist(), likeliest)


def likeliest_tokens(logprobs_BV: Tensor, count: int) -> list[TopLogprobs]:
    """The `count` likeliest tokens of each row with their log-probabilities, best first."""
    values_BC, tokens_BC = logprobs_BV.topk(min(count, logprobs_BV.shape[1]))
    return [list(zip(*row, strict=True)) for row in zip(tokens_BC.tolist(), values_BC.tolist(), strict=True)]


def adjust(logits_BV: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Logits after penalties, bias and barred tokens; the argument itself when no row has any."""
    if not any(row.params.has_penalties or row.params.logit_bias or row.barred_ids for row in rows):
        return logits_BV
    adjusted_BV = logits_BV.clone()
    for row, logits_V in zip(rows, adjusted_BV, strict=True):
        if row.params.has_penalties:
            _penalise(logits_V, row)
        if row.params.logit_bias:
            biased = torch.tensor(list(row.params.logit_bias), device=logits_V.device)
            logits_V[biased] += torch.tensor(list(row.params.logit_bias.values()), device=logits_V.device)
        if row.barred_ids:
            logits_V[torch.tensor(list(row.barred_ids), device=logits_V.device)] = -torch.inf
    return adjusted_BV


def _penalise(logits_V: Tensor, row: Sequence) -> None:
    """In place. Repetition as in CTRL (arXiv 1909.05858), over prompt and answer; the other two over the
    answer."""
    params = row.params
    if params.repetition_penalty != 1:
        seen = torch.tensor(sorted(row.seen_ids), device=logits_V.device)
        logits = logits_V[seen]
        # Dividing a negative logit would make the token likelier.
        logits_V[seen] = torch.where(logits > 0, logits / params.repetition_penalty, logits * params.repetition_penalty)
    if row.counts:
        said = torch.tensor(list(row.counts), device=logits_V.device)
        counts = torch.tensor(list(row.counts.values()), dtype=logits_V.dtype, device=logits_V.device)
        logits_V[said] -= params.presence_penalty + params.frequency_penalty * counts


def sampling_distribution(logits_BV: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Log-probabilities [B, V] that rows are sampled from; -inf where filtered out. Greedy rows:
    temperature 1."""
    temperatures_B = logits_BV.new_tensor([row.params.temperature or 1.0 for row in rows])
    # The maximum goes first: a tiny temperature then gives 0 and -inf, never inf - inf.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)) / temperatures_B[:, None]
    filtered = [i for i, row in enumerate(rows) if row.params.top_k > 0 or row.params.top_p < 1]
    if filtered:
        which = torch.tensor(filtered, device=logits_BV.device)
        top_k_B = torch.tensor([rows[i].params.top_k for i in filtered], device=logits_BV.device)
        top_p_B = torch.tensor([rows[i].params.top_p for i in filtered], dtype=torch.float64, device=logits_BV.device)
        part_BV = scaled_BV[which]
        scaled_BV[which] = part_BV.masked_fill(~kept_tokens(part_BV, top_k_B, top_p_B), -torch.inf)
    if any(row.params.min_p > 0 for row in rows):
        min_p_B = logits_BV.new_tensor([row.params.min_p for row in rows])
        # The likeliest token has scaled logit 0, so exp(scaled) is the ratio to its probability.
        scaled_BV = scaled_BV.masked_fill(scaled_BV.exp() < min_p_B[:, None], -torch.inf)
    return torch.log_softmax(scaled_BV, -1)


def kept_tokens(scaled_BV: Tensor, top_k_B: Tensor, top_p_B: Tensor) -> Tensor:
    """Boolean [B, V]: the tokens that top-k (0 = off), then top-p (1 = off) of the renormalised rest,
    keep."""
    vocab_size = scaled_BV.shape[1]
    has_k_B = top_k_B > 0
    k_B = torch.where(has_k_B, top_k_B, vocab_size)
    candidates = max(CANDIDATES, int(top_k_B.max()))
    while True:
        candidates = min(candidates, vocab_size)
        values_BC, tokens_BC = scaled_BV.topk(candidates)
        in_k_BC = torch.arange(candidates, device=k_B.device) < k_B[:, None]
        probabilities_BC = values_BC.double().exp() * in_k_BC
        total_B = torch.where(has_k_B, probabilities_BC.sum(-1), scaled_BV.double().exp().sum(-1))
        probabilities_BC /= total_B[:, None]
        up_to_BC = probabilities_BC.cumsum(-1)
        # A token stays while those likelier than it do not reach top_p by themselves.
        keep_BC = in_k_BC & ((up_to_BC - probabilities_BC < top_p_B[:, None]) | (top_p_B[:, None] >= 1))
        if candidates == vocab_size or bool((has_k_B | (up_to_BC[:, -1] >= top_p_B)).all()):
            return torch.zeros_like(scaled_BV, dtype=torch.bool).scatter_(1, tokens_BC, keep_BC)
        candidates = vocab_size


def draw(logprobs_BV: Tensor, rows: Rows[Sequence]) -> Tensor:
    """Token ids [B] by inverting the cumulative distribution at each row's own random number."""
    numbers = uniforms([row.key for row in rows], [len(row.ids) for row in rows])
    cumulative_BV = logprobs_BV.double().exp().cumsum(-1)
    targets_B = torch.from_numpy(numbers).to(logprobs_BV.device) * cumulative_BV[:, -1]
    # right: the first token whose cumulative probability exceeds the target; it has a positive probability
    # itself.
    return torch.searchsorted(cumulative_BV, targets_B[:, None], right=True)[:, 0]
