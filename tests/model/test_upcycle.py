"""A mixture built from a dense model computes what the dense model did."""

from __future__ import annotations

import pytest
import torch
from model_helpers import row_logits, tiny_model

from minnow.config import UserError
from minnow.model.experts_config import ExpertsConfig
from minnow.model.upcycle import upcycle

SOFTMAX = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 80}
SIGMOID = SOFTMAX | {"moe_intermediate_size": 40, "scoring": "sigmoid", "n_shared_experts": 2}


@pytest.mark.parametrize("experts", [SOFTMAX, SIGMOID, SIGMOID | {"first_k_dense_replace": 1}])
def test_it_starts_as_the_dense_model(experts):
    dense = tiny_model()
    tokens = torch.randint(0, 97, (2, 20))
    mixture = upcycle(dense, ExpertsConfig(**experts), seed=0)
    with torch.no_grad():
        torch.testing.assert_close(row_logits(mixture, tokens), row_logits(dense, tokens), atol=1e-4, rtol=1e-4)


def test_it_ends_where_the_dense_model_ends():
    dense = tiny_model()
    dense.generation_config = {"eos_token_id": [5, 7], "temperature": 0.6}
    assert upcycle(dense, ExpertsConfig(**SOFTMAX), seed=0).stop_ids == [5, 7]


def test_routers_are_drawn_by_the_seed_and_the_precision_is_the_dense_models():
    dense = tiny_model()
    dense.compute_dtype = torch.bfloat16
    first, again, other = (upcycle(dense, ExpertsConfig(**SOFTMAX), seed=seed) for seed in (1, 1, 2))
    routers = [mixture.model.layers[0].mlp.gate.weight for mixture in (first, again, other)]
    assert torch.equal(routers[0], routers[1])
    assert not torch.equal(routers[0], routers[2])
    assert first.compute_dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (SOFTMAX | {"moe_intermediate_size": 64}, "give 80"),
        (SOFTMAX | {"num_experts_per_tok": 1}, "num_experts_per_tok of 2 or more"),
        (SIGMOID | {"n_shared_experts": 1}, r"\(40\) must be its width \(80\)"),
    ],
)
def test_widths_that_forbid_it_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        upcycle(tiny_model(), ExpertsConfig(**changes), seed=0)


def test_a_mixture_is_not_upcycled_again():
    with pytest.raises(UserError, match="has experts already"):
        upcycle(tiny_model(experts=ExpertsConfig(**SOFTMAX)), ExpertsConfig(**SOFTMAX), seed=0)
