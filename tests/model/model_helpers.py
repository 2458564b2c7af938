"""Random small shapes, and our attention in the form transformers needs it."""

from __future__ import annotations

import json
from itertools import pairwise

import torch
from hypothesis import strategies as st
from torch import Tensor

from minnow.model.attention import Attention, CausalAttention, causal_attention
from minnow.model.config import ModelConfig, RopeScaling
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


@st.composite
def scalings(draw, trained: int = 16) -> RopeScaling | None:
    kind = draw(st.sampled_from(["none", "linear", "yarn", "llama3"]))
    if kind == "none":
        return None
    more = {}
    if kind == "yarn":
        more = {"beta_slow": draw(st.floats(0.25, 2)), "beta_fast": draw(st.floats(3, 40))}
        more["attention_factor"] = draw(st.floats(0.8, 1.5))
    elif kind == "llama3":
        more = {"low_freq_factor": draw(st.floats(0.25, 2)), "high_freq_factor": draw(st.floats(2.5, 8))}
    factor = draw(st.floats(1, 16))
    return RopeScaling(type=kind, factor=factor, original_max_position_embeddings=trained, **more)


def reach(scaling: RopeScaling | None) -> int:
    """A max_position_embeddings that goes with the scaling: a shorter one with yarn is read as what yarn reaches."""
    return 64 if scaling is None or scaling.type != "yarn" else max(64, round(16 * scaling.factor))


def written_scaling(scaling: RopeScaling | None) -> dict:
    """As transformers writes it, without the base."""
    if scaling is None:
        return {"rope_type": "default"}
    fields = {
        "linear": (),
        "yarn": ("attention_factor", "beta_fast", "beta_slow", "original_max_position_embeddings"),
        "llama3": ("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }[scaling.type]
    return {"rope_type": scaling.type, "factor": scaling.factor} | {f: getattr(scaling, f) for f in fields}


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


def assert_same_logits(ours: CausalLM, reference: torch.nn.Module, tokens: torch.Tensor) -> None:
    """The whole text at once, and all but its last two tokens followed by these one by one, with both caches."""
    length = tokens.shape[1]
    with torch.no_grad():
        whole, expected = row_logits(ours, tokens), reference(tokens).logits
        torch.testing.assert_close(whole, expected, atol=1e-4, rtol=1e-4)
        kept, their_cache = KeptKeys(), None
        for start, stop in pairwise([0, *range(max(1, length - 2), length + 1)]):
            positions = torch.arange(start, stop).expand(tokens.shape[0], -1)
            hidden = ours(tokens[:, start:stop], positions, kept)
            out = reference(tokens[:, start:stop], past_key_values=their_cache, use_cache=True)
            their_cache = out.past_key_values
            torch.testing.assert_close(ours.logits(hidden), out.logits, atol=1e-4, rtol=1e-4)
            torch.testing.assert_close(out.logits, whole[:, start:stop], atol=1e-4, rtol=1e-4)


def assert_same_model(back: torch.nn.Module, reference: torch.nn.Module, tokens: torch.Tensor) -> None:
    """Of transformers both. By name: a tied GLM-4-MoE comes back with its head written out."""
    assert type(back) is type(reference)
    kept, stored = back.state_dict(), reference.state_dict()
    assert kept.keys() == stored.keys()
    assert all(torch.equal(kept[name], tensor) for name, tensor in stored.items())
    with torch.no_grad():
        torch.testing.assert_close(back(tokens).logits, reference(tokens).logits, atol=1e-5, rtol=1e-5)


def change_config(folder, **changes) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | changes))


class FakeTokenizer:
    """What saving a model asks of a tokenizer."""

    bos_id, pad_id, stop_ids = 0, 0, [2, 0]

    def save_pretrained(self, folder) -> None:
        (folder / "tokenizer.json").write_text("{}")
