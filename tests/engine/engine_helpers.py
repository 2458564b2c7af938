"""A tiny random model and a tokenizer of bare bytes and a few merges."""

from __future__ import annotations

import io
from functools import cache
from typing import Any

import numpy as np
import PIL.Image
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from minnow.engine.grammar import json_grammar
from minnow.model.attention import CausalAttention
from minnow.model.config import ModelConfig
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.tokenizer.chat import Conversation, Message, Rendered, render
from minnow.tokenizer.images import Image, ImageFormat
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.tokenizer.train import train_tokenizer

WIDE = json_grammar({"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(500)}})
"""Valid, but more than llguidance's parser takes once the brace is open."""
LATE = f"start: /[ab]{{4}}/ rest\nrest: {WIDE.removeprefix('start: ')}"
"""So is this one, four letters later."""


@cache
def tiny_tokenizer() -> Tokenizer:
    return train_tokenizer(["the little minnow swims in the pond. 小鱼在池塘里游泳。"] * 10, 320)


class NoTorch(TorchDispatchMode):
    """Fails at any operation of torch's in this thread."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise AssertionError(f"{function} was called")


def tiny_model(seed: int = 0, **changes: Any) -> CausalLM:
    """Every weight random and large, so that no token is likely for a dull reason."""
    shape = {
        "vocab_size": tiny_tokenizer().vocab_size,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 128,
    }
    model = CausalLM(ModelConfig(**(shape | changes)))
    draw(model, seed)
    return model


@torch.no_grad()
def draw(model: CausalLM, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        low, high = (0.5, 1.5) if parameter.ndim == 1 else (-0.4, 0.4)
        parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))


@cache
def seeing_tokenizer() -> Tokenizer:
    """The same words, beside a model that looks at pictures of 4 patches."""
    return Tokenizer(tiny_tokenizer()._tokenizer, image_format=ImageFormat(image_size=16, patch_size=8))


def seeing_model(seed: int = 0, **changes: Any) -> VisionLanguageModel:
    """`tiny_model` with eyes as random and large."""
    vision = VisionConfig(
        image_size=16, patch_size=8, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2
    )
    model = VisionLanguageModel(tiny_model(seed, **changes).config, vision, seeing_tokenizer().image_id)
    draw(model, seed)
    return model


def picture(seed: int) -> bytes:
    """A file of a few coloured squares."""
    file = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 2, (4, 4, 3), np.uint8) * 255
    PIL.Image.fromarray(colours).save(file, "PNG")
    return file.getvalue()


def shown(*seeds: int, text: str = "What swims in the pond?") -> Rendered:
    """A user's message with so many pictures, the first before the text and the others in it."""
    images = tuple(Image(picture(seed), 5 * i) for i, seed in enumerate(seeds))
    conversation = Conversation((Message("user", text, images=images),))
    return render(seeing_tokenizer(), conversation, add_generation_prompt=True)


def random_prompts(count: int, seed: int = 0, longest: int = 40) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest + 1, (count,), generator=generator).tolist()
    vocab_size = tiny_tokenizer().vocab_size
    return [torch.randint(3, vocab_size, (length,), generator=generator).tolist() for length in lengths]


@torch.no_grad()
def full_logits(model: CausalLM, ids: list[int]) -> torch.Tensor:
    """[T, V] from one forward pass without a cache."""
    tokens = torch.tensor([ids])
    hidden = model(tokens, torch.arange(len(ids))[None], CausalAttention())
    return model.logits(hidden)[0]
