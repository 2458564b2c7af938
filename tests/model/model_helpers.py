"""Random small shapes, and our attention in the form transformers needs it."""

from __future__ import annotations

import torch
from torch import Tensor

from minnow.model.attention import Attention, CausalAttention, causal_attention
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM


def tiny_config(**changes) -> ModelConfig:
    shape = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**(shape | changes))


def randomized(model: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """Every weight random, also those that start at zero or one: no mistake hides behind a zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            low, high = (0.5, 1.5) if parameter.ndim == 1 else (-0.25, 0.25)
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))
    return model


def tiny_model(seed: int = 0, **changes) -> CausalLM:
    return randomized(CausalLM(tiny_config(**changes)), seed)


def positions_like(tokens_BT: Tensor) -> Tensor:
    return torch.arange(tokens_BT.shape[1]).expand(tokens_BT.shape)


def row_logits(model: CausalLM, tokens_BT: Tensor, attention: Attention | None = None) -> Tensor:
    hidden = model(tokens_BT, positions_like(tokens_BT), attention or CausalAttention())
    return model.logits(hidden)


class KeptKeys:
    """The least cache: keys and values of each layer, appended; the queries are the last ones."""

    def __init__(self) -> None:
        self.kept: dict[int, tuple[Tensor, Tensor]] = {}

    def __call__(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if layer in self.kept:
            k, v = (torch.cat(pair, dim=1) for pair in zip(self.kept[layer], (k, v), strict=True))
        self.kept[layer] = (k, v)
        padding = q.new_zeros(q.shape[0], k.shape[1] - q.shape[1], *q.shape[2:])
        return causal_attention(torch.cat((padding, q), dim=1), k, v)[:, -q.shape[1] :]


class FakeTokenizer:
    """What saving a model asks of a tokenizer."""

    bos_id, pad_id, stop_ids = 0, 0, [2, 0]

    def save_pretrained(self, folder) -> None:
        (folder / "tokenizer.json").write_text("{}")
