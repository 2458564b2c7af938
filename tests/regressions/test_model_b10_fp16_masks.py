"""B10 (minimind): a mask of -1e9 overflows to -inf in fp16, rows that see nothing become NaN and poison all.

Here nothing is masked, so half precision stays finite whatever the filler.
"""

from __future__ import annotations

import pytest
import torch

from minnow.model.attention import PackedAttention
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[30, 2, 31, 1], [1, 63], [64], [16, 16, 16, 16]])
def test_half_precision_with_filler_is_finite(dtype, lengths):
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = CausalLM(config)
    model.compute_dtype = dtype
    tokens = torch.randint(1, 50, (1, 64))
    tokens[0, sum(lengths[:-1]) :] = 0  # the last piece is filler
    positions = torch.cat([torch.arange(length) for length in lengths]).view(1, -1)
    attention = PackedAttention(torch.tensor([0, *lengths]).cumsum(0))
    hidden = model(tokens, positions, attention)
    assert hidden.dtype == dtype
    logits = model.logits(hidden)
    assert logits.dtype == torch.float32
    assert logits.isfinite().all()
    logits.log_softmax(-1).mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
