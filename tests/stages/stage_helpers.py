"""A tiny model folder whose answers can be dictated."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from minnow.model.config import ModelConfig
from minnow.model.lora import LoraConfig, add_lora, lora_layers
from minnow.model.pretrained import load_pretrained, save_pretrained
from minnow.model.transformer import CausalLM
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.tokenizer.train import train_tokenizer


def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["the little minnow swims in the pond. 小鱼在池塘里游泳。"] * 10, 320)


def save_random_model(folder: Path, context: int = 128, hidden_size: int = 16) -> Path:
    tokenizer = tiny_tokenizer()
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=hidden_size,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=context,
    )
    save_pretrained(CausalLM(config), folder, tokenizer)
    return folder


def save_lively_model(folder: Path, seed: int = 0, **shape: int) -> Path:
    """A random model whose weights are so large that no token is likely for a dull reason."""
    save_random_model(folder, **shape)
    model = load_pretrained(folder)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            low, high = (0.5, 1.5) if parameter.ndim == 1 else (-0.5, 0.5)
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))
    save_pretrained(model, folder, tiny_tokenizer())
    return folder


def save_random_adapter(folder: Path, base: Path, seed: int, **settings: Any) -> Path:
    """An adapter on the model in `base` that says something else than the model does."""
    model = load_pretrained(base)
    add_lora(model, LoraConfig(**({"rank": 4} | settings)), base=str(base.resolve()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in lora_layers(model).values():
            for parameter in (layer.lora_A.weight, layer.lora_B.weight):
                parameter.add_(torch.empty(parameter.shape).uniform_(-0.4, 0.4, generator=generator))
    save_pretrained(model, folder, Tokenizer.from_pretrained(base))
    return folder


def save_parrot_model(folder: Path, script: str, context: int = 4096, tokenizer: Tokenizer | None = None) -> Path:
    """A model that says what `script` does after each of its tokens: no attention, a table of next tokens.

    The embedding of token i is the i-th unit vector, the layers add nothing, and head row j points at the tokens that
    come before j. After any token outside the script comes the script's first token. `script` may name control tokens.
    """
    tokenizer = tokenizer or tiny_tokenizer()
    size = tokenizer.vocab_size
    ids: list[int] = []
    for index, part in enumerate(script.split("§")):  # §<|im_end|>§ is a control token
        ids += [tokenizer.special_ids[part]] if index % 2 else tokenizer.encode(part)
    assert len(set(ids)) == len(ids), "a table of next tokens cannot say a token twice with different successors"
    config = ModelConfig(
        vocab_size=size,
        hidden_size=size,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=context,
        tie_word_embeddings=False,
    )
    model = CausalLM(config)
    assert model.lm_head is not None
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_() if parameter.ndim == 2 else parameter.fill_(1)
        model.model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight[ids[0]] = 1.0
        for before, after in zip(ids, [*ids[1:], ids[0]], strict=True):
            model.lm_head.weight[:, before] = 0.0
            model.lm_head.weight[after, before] = 10.0
    save_pretrained(model, folder, tokenizer)
    return folder
