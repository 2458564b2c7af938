"""E8 (minimind): a config that advertises 32,768 positions for a model trained on 340 to 768 tokens.

Here no preset advertises what its recipe does not train, a longer sequence is refused, and only a stated
scaling goes beyond.
"""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from minnow.config import UserError
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig, RopeScaling
from minnow.model.context import extend_context
from minnow.model.presets import PRESETS
from minnow.model.pretrained import save_pretrained
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


def test_a_stretched_model_says_from_where_and_how_warm(tmp_path):
    """A YaRN whose original length nobody trained, and an attention factor left to each reader's own default (#842)."""
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=32,
    )  # fmt: skip
    model = CausalLM(config)
    model.config = extend_context(config, "yarn", 4)
    save_pretrained(model, tmp_path / "model")
    content = json.loads((tmp_path / "model" / "config.json").read_text())
    assert content["max_position_embeddings"] == 128
    for rope in (content["rope_scaling"], content["rope_parameters"]):  # for readers of transformers 4, and of 5
        assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 4.0, 32)
        assert rope["attention_factor"] == pytest.approx(0.1 * math.log(4) + 1)
