"""Texts that a model only reads."""

from __future__ import annotations

import pytest
import torch

from minnow.config import UserError
from minnow.engine.hidden import packed_hidden, text_logprobs
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
    for read in (lambda: packed_hidden(model, [[1], [1] * 9]), lambda: text_logprobs(model, [1] * 9)):
        with pytest.raises(UserError, match="a sequence of 9 tokens is longer"):
            read()


def test_a_long_text_is_scored_without_all_its_logits_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A text of 32,000 tokens under a vocabulary of 150,000 took 19 GB."""
    shape = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = CausalLM(ModelConfig(vocab_size=32, num_key_value_heads=1, head_dim=16, **shape), seed=1)
    ids = torch.randint(32, (50,), generator=torch.Generator().manual_seed(1)).tolist()
    with torch.no_grad():
        logprobs_TV = torch.log_softmax(model.logits(packed_hidden(model, [ids])), -1)
    expected_T = logprobs_TV[range(49), ids[1:]]
    monkeypatch.setattr(model, "logits", lambda hidden: pytest.fail("all at once"))
    torch.testing.assert_close(text_logprobs(model, ids), expected_T, rtol=1e-5, atol=1e-5)
