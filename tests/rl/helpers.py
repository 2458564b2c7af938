"""A tiny chat model, and prompts whose right answer is one of its tokens."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from minnow.model.config import ModelConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.tokenizer import Tokenizer, train_tokenizer


def tiny(seed: int = 0, **changes: Any) -> tuple[CausalLM, Tokenizer]:
    tokenizer = train_tokenizer(["yes no maybe 0 1 2 3 4 5 6 7 8 9 say it is so"] * 50, 320)
    shape = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=128,
    )
    return CausalLM(replace(shape, **changes), seed=seed).eval(), tokenizer


def saved(folder: Path, seed: int = 0, **changes: Any) -> Path:
    model, tokenizer = tiny(seed, **changes)
    # At initialisation the output projections are zero: every position says the same. Stir them.
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    save_pretrained(model, folder, tokenizer=tokenizer)
    return folder


def write_prompts(path: Path, count: int = 8) -> Path:
    rows = [{"prompt": f"say {number}", "answer": str(number)} for number in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def any_reward(trajectories: list) -> list[float]:
    """A reward that differs between nearly any two answers, so that there is always something to learn."""
    return [sum(trajectory.ids) % 17 / 17 for trajectory in trajectories]
