"""Texts that a model only reads."""

from __future__ import annotations

import pytest
import torch

from minnow.config import UserError
from minnow.engine.hidden import packed_hidden, token_logprobs
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM


def test_a_text_beyond_the_context_is_refused_on_every_device() -> None:
    """On a GPU the model itself does not look: vectors and log-probabilities were numbers that mean nothing."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    config = ModelConfig(vocab_size=32, num_key_value_heads=1, head_dim=16, max_position_embeddings=8, **shape)
    with torch.device("meta"):  # a device without a CPU's check, and without a GPU
        model = CausalLM(config)
    assert packed_hidden(model, [[1] * 8, [2]]).shape == (9, 16)
    assert packed_hidden(model, [[1] * 9], allow_beyond_trained_length=True).shape == (9, 16)
    for read in (lambda: packed_hidden(model, [[1], [1] * 9]), lambda: token_logprobs(model, [1] * 9)):
        with pytest.raises(UserError, match="a sequence of 9 tokens is longer"):
            read()
