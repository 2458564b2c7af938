"""The sampler against transformers' own processors, against its distribution, and for independence of its
neighbours."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from engine_helpers import tiny_tokenizer
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from minnow.config import UserError
from minnow.engine.counter_random import sample_key, uniforms
from minnow.engine.sampler import Sampled, Sampler, Wishes, adjust, filtered_logits
from minnow.engine.sampling import SamplingParams
from minnow.engine.sequence import Request, Sequence


def sample(logits: torch.Tensor, rows: list[Sequence]) -> Sampled:
    return Sampler()(logits, rows)


def sampling_distribution(logits: torch.Tensor, rows: list[Sequence]) -> torch.Tensor:
    return filtered_logits(logits, Wishes(rows)).log_softmax(-1)


def adjusted(logits: torch.Tensor, row: Sequence) -> torch.Tensor:
    return adjust(logits, [row], Wishes([row]))


def make_row(
    prompt: list[int] | None = None, said: list[int] | None = None, index: int = 0, **options: Any
) -> Sequence:
    params = SamplingParams(**{"seed": 0, **options})
    request = Request(
        id=0,
        prompt_ids=prompt or [1],
        params=params,
        seed=params.seed or 0,
        max_tokens=10_000,
        end_ids=frozenset({2}),
    )
    row = Sequence(request, index, tiny_tokenizer())
    for token in said or []:
        row.append(token)
    return row


@pytest.mark.parametrize("vocab_size", [50, 1000])
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_k": 5000},
        {"top_k": 10**30},
        {"top_p": 0.3},
        {"top_p": 0.95},
        {"min_p": 0.1},
        {"min_p": 1.0},  # the likeliest stays
        {"temperature": 1.5, "top_k": 20, "top_p": 0.8, "min_p": 0.05},
        {
            "temperature": 100.0,
            "top_p": 0.9,
        },  # flat: the nucleus is larger than the candidates looked at first
    ],
)
def test_distribution_equals_transformers(options: dict[str, Any], vocab_size: int) -> None:
    torch.manual_seed(0)
    logits = torch.randn(3, vocab_size) * 3
    rows = [make_row(**options) for _ in range(3)]
    expected = logits
    for name, warper in [
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
        ("min_p", MinPLogitsWarper),
    ]:
        if name in options:
            expected = warper(options[name])(None, expected)
    torch.testing.assert_close(sampling_distribution(logits, rows), expected.log_softmax(-1), atol=1e-5, rtol=1e-5)


def test_without_top_p_the_unlikeliest_of_the_k_stays() -> None:
    """Though the likeliest one's probability is 1 after rounding."""
    logprobs = sampling_distribution(torch.tensor([[0.0, -50.0, -60.0]]), [make_row(top_k=2)])
    assert logprobs[0].isfinite().tolist() == [True, True, False]


def test_rows_with_different_wishes_do_not_touch_each_other() -> None:
    torch.manual_seed(1)
    wishes = [
        {"temperature": 0.0},
        {"temperature": 0.5, "top_p": 0.4},
        {},
        {"top_k": 3, "logit_bias": {4: 5.0}},
        {"min_p": 0.2, "repetition_penalty": 1.3},
        {"temperature": 30.0, "top_p": 0.99, "presence_penalty": 1.0},
    ]
    for trial in range(20):
        logits = torch.randn(len(wishes), 600) * 2
        rows = [make_row([5, 6], [7, 8], seed=trial + 100 * i, logprobs=True, **wish) for i, wish in enumerate(wishes)]
        together = sample(logits, rows)
        assert together.logprobs is not None
        for i, row in enumerate(rows):
            alone = sample(logits[i : i + 1], [row])
            assert alone.ids == [together.ids[i]]
            assert alone.logprobs == pytest.approx([together.logprobs[i]], abs=1e-5)


def test_a_sampler_asks_the_rows_that_come_for_their_wishes() -> None:
    """It keeps those of the step before while the rows stay; as many other rows are others."""
    torch.manual_seed(7)
    logits, kept = torch.randn(1, 50), Sampler()
    rows = [make_row(index=index) for index in range(20)]
    drawn = [kept(logits, [row]).ids for row in rows]
    assert drawn == [sample(logits, [row]).ids for row in rows]
    assert len({tuple(ids) for ids in drawn}) > 1


def test_repetition_penalty_equals_transformers_also_for_negative_logits() -> None:
    torch.manual_seed(2)
    logits = torch.randn(1, 40) * 3
    prompt, said = [3, 4, 5, 4], [6, 7, 6]
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([prompt + said]), logits.clone())
    before = logits.clone()
    got = adjusted(logits, make_row(prompt, said, repetition_penalty=1.5))
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(logits, before)  # the argument is left alone: raw log-probabilities need it


def test_presence_and_frequency_penalties_by_hand() -> None:
    logits = torch.zeros(1, 10)
    got = adjusted(logits, make_row([3, 3], [6, 7, 6], presence_penalty=0.5, frequency_penalty=0.25))
    # Only the answer counts: 6 twice: 0.5 + 2 * 0.25 = 1; 7 once: 0.5 + 0.25 = 0.75; the prompt's 3 not at
    # all.
    assert got[0].tolist() == [0, 0, 0, 0, 0, 0, -1.0, -0.75, 0, 0]


def test_logit_bias_and_min_tokens() -> None:
    logits = torch.zeros(1, 4)
    logits[0, 2] = 10  # the end token
    assert sample(logits, [make_row(temperature=0.0)]).ids == [2]
    assert sample(logits, [make_row(temperature=0.0, min_tokens=1, logit_bias={3: 1.0})]).ids == [3]
    assert sample(logits, [make_row([1], [3], temperature=0.0, min_tokens=1)]).ids == [2]


def test_tiny_temperature_is_greedy_and_finite() -> None:
    logits = torch.tensor([[50.0, 80.0, -40.0]])
    result = sample(logits, [make_row(temperature=1e-30, logprobs=True)])
    assert (result.ids, result.logprobs) == ([1], [0.0])


@pytest.mark.parametrize("options", [{}, {"temperature": 2.0, "top_k": 6}, {"top_p": 0.8}])
def test_frequencies_match_the_distribution(options: dict[str, Any]) -> None:
    torch.manual_seed(3)
    draws, logits = 5_000, torch.randn(1, 12)
    rows = [make_row(index=i, **options) for i in range(draws)]
    counts = torch.bincount(torch.tensor(sample(logits.expand(draws, -1), rows).ids), minlength=12)
    expected = sampling_distribution(logits, rows[:1])[0].exp() * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    chi_square = ((counts - expected)[possible] ** 2 / expected[possible]).sum().item()
    freedom = int(possible.sum()) - 1
    # Wilson-Hilferty: (chi2/k)^(1/3) is about normal; 3.7 sigma is one false alarm in 10,000 (and the seed
    # is fixed).
    z = ((chi_square / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / math.sqrt(2 / (9 * freedom))
    assert z < 3.7


def test_uniforms_are_uniform_and_depend_on_every_argument() -> None:
    keys = [sample_key(seed, index) for seed in range(100) for index in range(10)]
    numbers = uniforms(np.repeat(np.array(keys, dtype=np.uint64), 20), [step for _ in keys for step in range(20)])
    assert len(set(numbers.tolist())) == numbers.size  # 20,000 of 2**40: no two equal
    assert abs(numbers.mean() - 0.5) < 4 * math.sqrt(1 / 12 / numbers.size)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    by_step = numbers.reshape(-1, 20) - 0.5
    neighbours = (by_step[:, 1:] * by_step[:, :-1]).mean()
    assert abs(neighbours) < 4 / 12 / math.sqrt(numbers.size)
    assert uniforms(np.array([sample_key(2**64 - 1, 0)], dtype=np.uint64), [10**6]).shape == (1,)


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 2.0},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": 5e-324},
        {"presence_penalty": math.nan},
        {"frequency_penalty": math.inf},
        {"max_tokens": 0},
        {"max_tokens": 2, "min_tokens": 3},
        {"n": 0},
        {"seed": -1},
        {"logit_bias": {3: math.inf}},
        {"top_logprobs": -1},
        {"min_tokens": -1},
        {"stop": [""]},
        {"stop": ""},
    ],
)
def test_bad_options_are_named(options: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=list(options)[-1]):
        SamplingParams(**options)


@pytest.mark.parametrize("temperature", [1e-8, 5e-324])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    assert SamplingParams(temperature=temperature) == SamplingParams(temperature=0.0)


def test_a_single_stop_string_is_not_taken_letter_by_letter() -> None:
    assert list(SamplingParams(stop="abc").stop) == ["abc"]


@pytest.mark.parametrize(
    ("score", "options"),
    [
        (math.inf, {"logprobs": True}),  # what fp16 makes of a large number
        (math.nan, {}),
        (math.nan, {"top_k": 3}),
        (math.nan, {"top_p": 0.9}),
        (math.nan, {"min_p": 0.1}),
        (math.nan, {"temperature": 0.0}),
    ],
)
def test_scores_that_are_no_numbers_are_told_in_words(score: float, options: dict[str, Any]) -> None:
    """The draw ended behind the vocabulary, and the next step in an IndexError (on CUDA in a dead process).

    A greedy choice took the NaN for the greatest: its answer was one token over and over, and an examination's figure.
    """
    logits = torch.randn(2, 50)
    logits[1, 7] = score
    with pytest.raises(UserError, match="scores are not numbers"):
        sample(logits, [make_row(**options), make_row(index=1, **options)])


class OnMps(torch.Tensor):
    """Stands for a tensor on one of Apple's GPUs, which this machine need not have."""

    @property
    def device(self) -> torch.device:
        return torch.device("mps")

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return self.as_subclass(torch.Tensor)


@pytest.mark.parametrize("options", [{}, {"temperature": 0.0}, {"top_p": 0.9, "repetition_penalty": 1.2}])
def test_logits_on_apples_gpus_are_drawn_from_on_the_host(options: dict[str, Any]) -> None:
    """These have no float64: the first token of every answer was a TypeError."""
    logits = torch.randn(1, 50)
    expected = sample(logits, [make_row(**options)]).ids
    assert sample(logits.as_subclass(OnMps), [make_row(**options)]).ids == expected
