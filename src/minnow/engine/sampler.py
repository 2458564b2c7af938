"""From logits to the next token of every row, for rows with different wishes in one batch."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from minnow.config import UserError
from minnow.engine.counter_random import uniforms
from minnow.engine.outputs import TopLogprobs
from minnow.engine.penalties import Penalties
from minnow.engine.sampling import SamplingParams
from minnow.engine.sequence import Sequence
from minnow.transfer import to_device

CANDIDATES = 256
"""Likeliest tokens looked at for top-p before the whole vocabulary is sorted, which is slow."""
_EVERY_TOKEN = 2**31
"""More than any vocabulary has, and no more than a tensor holds: `top_k` may be any number."""


@dataclass(frozen=True)
class Sampled:
    """The next tokens of B rows; log-probabilities only where a row asks for them."""

    ids: list[int]
    logprobs: list[float] | None
    raw_logprobs: list[float] | None
    top_logprobs: list[TopLogprobs] | None

    def logprobs_of(self, row: int, params: SamplingParams) -> tuple[float | None, float | None, TopLogprobs | None]:
        """What a row asked for of (sampling, raw, top) log-probabilities; None for the rest."""
        logprob, raw, top = None, None, None
        if params.logprobs and self.logprobs is not None and self.raw_logprobs is not None:
            logprob, raw = self.logprobs[row], self.raw_logprobs[row]
        if params.top_logprobs and self.top_logprobs is not None:
            top = self.top_logprobs[row][: params.top_logprobs]
        return logprob, raw, top


class Sampler:
    """Draws; keeps the rows' wishes as tensors while the rows stay the same."""

    def __init__(self) -> None:
        self._rows: list[Sequence] = []
        self._wishes: Wishes | None = None

    def __call__(self, logits_BV: Tensor, rows: list[Sequence]) -> Sampled:
        """Draw each row's next token from its own sampling distribution.

        logits_BV: float32, any device; not changed. A row's token depends on its logits, its parameters, its
        tokens so far and its random stream only. UserError where the logits are NaN.
        """
        if logits_BV.device.type == "mps":  # it has no float64, in which probabilities are added up
            logits_BV = logits_BV.cpu()
        if self._wishes is None or rows != self._rows:
            self._rows, self._wishes = list(rows), Wishes(rows, logits_BV.device)
        return _sample(logits_BV, rows, self._wishes)


class Wishes:
    """The parameters of B rows, side by side. None stands for what no row asks for."""

    def __init__(self, rows: Rows[Sequence], device: torch.device | str = "cpu"):
        params = [row.params for row in rows]

        def column(values: list[float]) -> Tensor:
            return torch.tensor(values, device=device)[:, None]

        self.keys = np.array([row.key for row in rows], dtype=np.uint64)
        self.greedy = all(p.temperature == 0 for p in params)
        self.random_B = torch.tensor([p.temperature > 0 for p in params], device=device)
        self.temperatures_B1 = column([p.temperature or 1.0 for p in params])
        self.min_p_B1 = column([p.min_p for p in params]) if any(p.min_p > 0 for p in params) else None
        filtered = [i for i, p in enumerate(params) if p.top_k > 0 or p.top_p < 1]
        self.filtered_F = torch.tensor(filtered, device=device) if filtered else None
        self.top_k_F = torch.tensor([min(params[i].top_k, _EVERY_TOKEN) for i in filtered], device=device)
        self.top_p_F = torch.tensor([params[i].top_p for i in filtered], dtype=torch.float64, device=device)
        self.adjusted = [
            i for i, p in enumerate(params) if p.has_penalties or p.logit_bias or p.min_tokens or p.grammar is not None
        ]
        self.logprobs = any(p.logprobs for p in params)
        self.top_logprobs = max(p.top_logprobs for p in params)


def _sample(logits_BV: Tensor, rows: Rows[Sequence], wishes: Wishes) -> Sampled:
    adjusted_BV = adjust(logits_BV, rows, wishes)
    scaled_BV = None
    if wishes.greedy:
        ids_B = _best(adjusted_BV)
    else:
        scaled_BV = filtered_logits(adjusted_BV, wishes)
        drawn_B = _draw(scaled_BV, wishes.keys, [len(row.ids) for row in rows])
        ids_B = torch.where(wishes.random_B, drawn_B, _best(adjusted_BV))
    ids = ids_B.tolist()
    if max(ids) >= logits_BV.shape[1]:  # where scores are NaN, both ways of choosing end behind the last token
        raise UserError(
            "the model's scores are not numbers: its weights are damaged, or overflow in this precision "
            "(--precision fp32 has more room)"
        )
    if not (wishes.logprobs or wishes.top_logprobs):
        return Sampled(ids, None, None, None)
    raw_BV = torch.log_softmax(logits_BV, -1)
    raw_B = raw_BV.gather(1, ids_B[:, None])[:, 0]
    likeliest = likeliest_tokens(raw_BV, wishes.top_logprobs) if wishes.top_logprobs else None
    if scaled_BV is None:
        logprobs = [0.0] * len(ids)  # a greedy choice is certain
    else:
        chosen_B = scaled_BV.gather(1, ids_B[:, None])[:, 0] - scaled_BV.logsumexp(-1)
        logprobs = torch.where(wishes.random_B, chosen_B, 0.0).tolist()
    return Sampled(ids, logprobs, raw_B.tolist(), likeliest)


def likeliest_tokens(logprobs_BV: Tensor, count: int) -> list[TopLogprobs]:
    """The `count` likeliest tokens of each row with their log-probabilities, best first."""
    values_BC, tokens_BC = logprobs_BV.topk(min(count, logprobs_BV.shape[1]))
    return [list(zip(*row, strict=True)) for row in zip(tokens_BC.tolist(), values_BC.tolist(), strict=True)]


def adjust(logits_BV: Tensor, rows: Rows[Sequence], wishes: Wishes) -> Tensor:
    """Logits after penalties, bias and barred tokens; the argument itself when no row has any."""
    if not wishes.adjusted:
        return logits_BV
    adjusted_BV = logits_BV.clone()
    device = logits_BV.device
    for i in wishes.adjusted:
        row, logits_V = rows[i], adjusted_BV[i]
        if row.params.has_penalties:
            if row.penalties is None:
                row.penalties = Penalties(row.params, row.request.prompt_ids, len(logits_V), device)
            row.penalties.apply(logits_V, row.ids)
        if row.params.logit_bias:
            bias = row.params.logit_bias
            logits_V[torch.tensor(list(bias), device=device)] += torch.tensor(list(bias.values()), device=device)
        if len(row.ids) < row.params.min_tokens:  # of a row that ignores its end tokens there may be none
            logits_V[torch.tensor(list(row.request.end_ids), dtype=torch.int64, device=device)] = -torch.inf
        if row.constraint is not None:
            logits_V.masked_fill_(~row.constraint.allowed(len(logits_V), device), -torch.inf)
    return adjusted_BV


def filtered_logits(logits_BV: Tensor, wishes: Wishes) -> Tensor:
    """Logits [B, V], 0 the largest, whose softmax rows are sampled from; -inf where filtered out. Greedy rows:
    temperature 1."""
    # The maximum goes first: a tiny temperature then gives 0 and -inf, never inf - inf.
    scaled_BV = (logits_BV - logits_BV.amax(-1, keepdim=True)).div_(wishes.temperatures_B1)
    if wishes.filtered_F is not None:
        part_FV = scaled_BV[wishes.filtered_F]
        kept_FV = kept_tokens(part_FV, wishes.top_k_F, wishes.top_p_F)
        scaled_BV[wishes.filtered_F] = part_FV.masked_fill(~kept_FV, -torch.inf)
    if wishes.min_p_B1 is not None:
        # The likeliest token has scaled logit 0, so exp(scaled) is the ratio to its probability.
        scaled_BV = scaled_BV.masked_fill(scaled_BV.exp() < wishes.min_p_B1, -torch.inf)
    return scaled_BV


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
        total_B = torch.where(has_k_B, probabilities_BC.sum(-1), scaled_BV.exp().sum(-1, dtype=torch.float64))
        probabilities_BC /= total_B[:, None]
        up_to_BC = probabilities_BC.cumsum(-1)
        # A token stays while those likelier than it do not reach top_p by themselves.
        keep_BC = in_k_BC & ((up_to_BC - probabilities_BC < top_p_B[:, None]) | (top_p_B[:, None] >= 1))
        if candidates == vocab_size or bool((has_k_B | (up_to_BC[:, -1] >= top_p_B)).all()):
            return torch.zeros_like(scaled_BV, dtype=torch.bool).scatter_(1, tokens_BC, keep_BC)
        candidates = vocab_size


def _best(logits_BV: Tensor) -> Tensor:
    """Token ids [B] of the greatest logits; V where one is NaN, which `argmax` takes for the greatest."""
    if logits_BV.device.type == "cpu":  # numpy's goes through vector lanes: a tenth of the time
        best_B1 = torch.from_numpy(logits_BV.numpy().argmax(-1, keepdims=True))
    else:
        best_B1 = logits_BV.argmax(-1, keepdim=True)
    is_nan_B1 = logits_BV.gather(1, best_B1).isnan()
    return best_B1.masked_fill(is_nan_B1, logits_BV.shape[1])[:, 0]


def _draw(scaled_BV: Tensor, keys: np.ndarray, steps: list[int]) -> Tensor:
    """Token ids [B] by inverting the cumulative distribution at each row's own random number."""
    cumulative_BV = scaled_BV.exp().cumsum(-1, dtype=torch.float64)
    targets_B = to_device(torch.from_numpy(uniforms(keys, steps)), scaled_BV.device) * cumulative_BV[:, -1]
    # right: the first token whose cumulative probability exceeds the target; it has a positive probability
    # itself.
    return torch.searchsorted(cumulative_BV, targets_B[:, None], right=True)[:, 0]
