"""B3: a rollout was sampled with temperature and top-p but scored with neither: the ratio's denominator was a policy
that never acted. The engine returns the log-probabilities of the very distribution it drew from, the raw ones
apart.
"""

from __future__ import annotations

import math
from collections import Counter

import torch

from minnow.engine import Engine, SamplingParams
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.tokenizer.train import train_tokenizer


def test_logprobs_are_those_of_the_policy_that_acted() -> None:
    tokenizer = train_tokenizer(["fish"] * 3, 288)
    config = ModelConfig(
        vocab_size=288, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = CausalLM(config)
    with torch.no_grad():
        model.head_weight.normal_(0, 0.2, generator=torch.Generator().manual_seed(0))
    samples = 4000
    params = SamplingParams(n=samples, max_tokens=1, temperature=0.8, top_p=0.5, top_k=50, seed=0, logprobs=True)
    (output,) = Engine(model, tokenizer).generate([[40, 41]], params)
    acted = Counter(completion.ids[0] for completion in output.completions)
    logprob = {c.ids[0]: c.logprobs[0] for c in output.completions if c.logprobs}
    raw = {c.ids[0]: c.raw_logprobs[0] for c in output.completions if c.raw_logprobs}
    assert 1 < len(acted) < 50
    assert math.isclose(sum(math.exp(value) for value in logprob.values()), 1.0, abs_tol=0.01)
    assert sum(math.exp(value) for value in raw.values()) < 0.9
    for token, count in acted.items():
        probability = math.exp(logprob[token])
        assert abs(count / samples - probability) < 5 * math.sqrt(probability * (1 - probability) / samples) + 1e-9
