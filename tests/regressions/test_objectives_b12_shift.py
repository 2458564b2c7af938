"""B12: a peer's DPO paired the logits at position t with the token at t, so it scored p(x_t | x_<=t)."""

import itertools
import math

import torch

from minnow.objectives import linear_cross_entropy, token_logprobs


def test_log_probability_of_a_sequence_is_that_of_each_next_token():
    """A bigram model whose table is read by hand: log p(x) = sum_t log p(x_t+1 | x_t)."""
    generator = torch.Generator().manual_seed(0)
    # Row: a token, column: the logit of each next one.
    table_VV = torch.randn(6, 6, generator=generator, dtype=torch.float64)
    tokens = [3, 1, 4, 1, 5, 0, 2]
    expected = 0.0
    for now, following in itertools.pairwise(tokens):
        row = table_VV[now].tolist()
        expected += row[following] - math.log(sum(math.exp(x) for x in row))

    inputs_N = torch.tensor(tokens[:-1])
    targets_N = torch.tensor(tokens[1:])
    hidden_ND = torch.nn.functional.one_hot(inputs_N, 6).double()
    logprobs_N = token_logprobs(hidden_ND, table_VV.T, targets_N)
    loss = linear_cross_entropy(hidden_ND, table_VV.T, targets_N, torch.ones(len(targets_N)))
    assert math.isclose(logprobs_N.sum().item(), expected, rel_tol=1e-12)
    assert math.isclose(loss.nll_sum.item(), -expected, rel_tol=1e-12)


def test_a_model_that_knows_the_next_token_has_no_loss_and_one_that_repeats_has():
    tokens_N = torch.tensor([0, 1, 2, 3, 4])
    targets_N = torch.tensor([1, 2, 3, 4, 0])
    weights_N = torch.ones(5)
    knows_ND = 50.0 * torch.nn.functional.one_hot(targets_N, 5).float()
    repeats_ND = 50.0 * torch.nn.functional.one_hot(tokens_N, 5).float()
    assert linear_cross_entropy(knows_ND, torch.eye(5), targets_N, weights_N).nll_sum.item() < 1e-6
    assert linear_cross_entropy(repeats_ND, torch.eye(5), targets_N, weights_N).nll_sum.item() > 5 * 49
