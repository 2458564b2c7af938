"""B14 (VerMind): without explicit positions, cached decoding turned every new token as at place 0.

Here positions are an argument that cannot be left out, and they decide.
"""

from __future__ import annotations

import inspect

import torch

from minnow.model.attention import CausalAttention, causal_attention
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM


class KeptKeys:
    """The least cache: keys and values of each layer, appended; new tokens come one by one."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def __call__(self, layer, q, k, v):
        if layer in self.kept:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = (k, v)
        padding = q.new_zeros(1, k.shape[1] - q.shape[1], *q.shape[2:])
        return causal_attention(torch.cat((padding, q), dim=1), k, v)[:, -q.shape[1] :]


def test_one_token_at_a_time_equals_all_at_once():
    config = ModelConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64,
    )  # fmt: skip
    model = CausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.3, 0.3)
        tokens = torch.randint(0, 50, (1, 12))
        whole = model(tokens, torch.arange(12).unsqueeze(0), CausalAttention())
        cache = KeptKeys()
        steps = [model(tokens[:, i : i + 1], torch.tensor([[i]]), cache) for i in range(12)]
        torch.testing.assert_close(torch.cat(steps, dim=1), whole, atol=1e-4, rtol=1e-4)
        at_zero = model(tokens[:, -1:], torch.tensor([[0]]), cache)
        assert not torch.allclose(at_zero, whole[:, -1:], atol=1e-3)


def test_positions_have_no_default():
    positions = inspect.signature(CausalLM.forward).parameters["positions_BT"]
    assert positions.default is inspect.Parameter.empty
