"""A tiny model that looks at pictures, and pictures for it."""

from __future__ import annotations

import base64
import io
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from minnow.model.config import ModelConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.tokenizer.images import ImageFormat
from minnow.tokenizer.tokenizer import Tokenizer
from minnow.tokenizer.train import train_tokenizer

IMAGE_FORMAT = ImageFormat(image_size=16, patch_size=8)
"""4 patches."""


def picture(seed: int, kind: str = "PNG") -> bytes:
    """A file of a few coloured squares."""
    file = io.BytesIO()
    colours = np.random.default_rng(seed).integers(0, 2, (4, 4, 3), np.uint8) * 255
    PIL.Image.fromarray(colours).resize((32, 32), PIL.Image.Resampling.NEAREST).save(file, kind)
    return file.getvalue()


def picture_file(folder: Path, seed: int) -> Path:
    """The same in a file of its own."""
    (folder / f"{seed}.png").write_bytes(picture(seed))
    return folder / f"{seed}.png"


def data_url(data: bytes, media: str = "image/png") -> str:
    """As clients send a picture."""
    return f"data:{media};base64,{base64.b64encode(data).decode()}"


def save_seeing_model(folder: Path, seed: int = 0, context: int = 256, tower_width: int = 16) -> Path:
    """Random, with weights so large that no token is likely for a dull reason: answers depend on what is shown."""
    words = train_tokenizer(["the little minnow swims in the pond. 小鱼在池塘里游泳。"] * 10, 320)
    tokenizer = Tokenizer(words._tokenizer, image_format=IMAGE_FORMAT)
    text = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=context,
    )
    vision = VisionConfig(
        image_size=IMAGE_FORMAT.image_size,
        patch_size=IMAGE_FORMAT.patch_size,
        hidden_size=tower_width,
        intermediate_size=24,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    model = VisionLanguageModel(text, vision, tokenizer.image_id)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            low, high = (0.5, 1.5) if parameter.ndim == 1 else (-0.4, 0.4)
            parameter.copy_(torch.empty(parameter.shape).uniform_(low, high, generator=generator))
    save_pretrained(model, folder, tokenizer)
    return folder
