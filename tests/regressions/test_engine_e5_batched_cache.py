"""E5: the cache was grown by concatenation for every token, with repeated heads, and prompts could not be batched.
Here it is allocated once, holds the key-value heads as they are, and prompts of all lengths share every forward pass.
"""

from __future__ import annotations

from unittest.mock import patch

from minnow.engine import Engine, SamplingParams
from minnow.engine.cache import PagedCache
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.tokenizer.train import train_tokenizer


def test_one_cache_and_one_forward_pass_a_step() -> None:
    tokenizer = train_tokenizer(["fish"] * 3, 288)
    config = ModelConfig(
        vocab_size=288, hidden_size=16, intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=1, head_dim=8,
    )  # fmt: skip
    model = CausalLM(config)
    shapes = []
    forward = model.forward
    model.forward = lambda tokens, *rest, **more: shapes.append(tuple(tokens.shape)) or forward(tokens, *rest, **more)
    caches: list[PagedCache] = []

    def allocate(*arguments: object) -> PagedCache:
        caches.append(PagedCache(*arguments))
        return caches[-1]

    prompts = [[40] * length for length in (1, 9, 4)]
    with patch("minnow.engine.parts.PagedCache", allocate):
        engine = Engine(model, tokenizer, cache_bytes=2**22)
        for _ in range(2):
            engine.generate(prompts, SamplingParams(max_tokens=5, ignore_eos=True))
            assert shapes == [(1, 14)] + [(3, 1)] * 4
            shapes.clear()
    (cache,) = caches
    assert {store.shape[2:] for store in (*cache.keys, *cache.values)} == {(1, 8)}  # one key-value head, not four
