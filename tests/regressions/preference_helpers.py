"""What the preference regressions start from: a tiny model, and pairs in which "yes" is better than "no"."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from minnow.model.config import ModelConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.tokenizer import train_tokenizer


def write_start(tmp_path: Path, pairs: int) -> None:
    """Write `tmp_path/start`, a model folder, and `tmp_path/pairs.jsonl`."""
    tokenizer = train_tokenizer(["yes no maybe fish 0123456789"] * 20, 320)
    shape = ModelConfig(
        vocab_size=320,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
        head_dim=32,
        max_position_embeddings=64,
    )
    save_pretrained(CausalLM(shape), tmp_path / "start", tokenizer)
    rows = [{"prompt": f"fish {i}", "chosen": "yes", "rejected": "no"} for i in range(pairs)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def wake(model: CausalLM) -> CausalLM:
    """Move all weights: of a fresh model some are zero, and its attention says nothing."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model
