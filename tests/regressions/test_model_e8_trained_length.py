"""E8 (minimind): a config that advertises 32,768 positions for a model trained on 340 to 768 tokens.

Here no preset advertises what its recipe does not train, a longer sequence is refused, and only a stated
scaling goes beyond.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from minnow.config import UserError
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig, RopeScaling
from minnow.model.presets import PRESETS
from minnow.model.transformer import CausalLM


def test_presets_advertise_trained_lengths():
    assert max(config.max_position_embeddings for config in PRESETS.values()) <= 2048


def test_longer_is_refused_unless_scaled():
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    tokens, positions = torch.zeros(1, 128, dtype=torch.int64), torch.arange(128).unsqueeze(0)
    with pytest.raises(UserError, match="--rope-scaling yarn"):
        CausalLM(config)(tokens, positions, CausalAttention())
    scaling = RopeScaling(type="yarn", factor=4.0, original_max_position_embeddings=32)
    scaled = dataclasses.replace(config, rope_scaling=scaling, max_position_embeddings=128)
    CausalLM(scaled)(tokens, positions, CausalAttention())
