"""Small pictures, files of them, and a tokenizer of a model that looks at them."""

import io
from pathlib import Path

import numpy as np
import PIL.Image

from minnow.tokenizer import Tokenizer
from minnow.tokenizer.images import ImageFormat

FORMAT = ImageFormat(image_size=16, patch_size=8)
"""Four image tokens a picture."""


def png(seed: int, size: int = 20) -> bytes:
    """A picture of noise."""
    noise = np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)
    file = io.BytesIO()
    PIL.Image.fromarray(noise).save(file, "PNG")
    return file.getvalue()


def write_pictures(folder: Path, count: int) -> list[bytes]:
    """0.png, 1.png, ... in `folder`; returns the files."""
    folder.mkdir(parents=True, exist_ok=True)
    files = [png(seed) for seed in range(count)]
    for number, data in enumerate(files):
        (folder / f"{number}.png").write_bytes(data)
    return files


def seeing(tokenizer: Tokenizer) -> Tokenizer:
    """The same tokenizer beside a model that looks at pictures."""
    return Tokenizer(tokenizer._tokenizer, image_format=FORMAT)


def shown(answer: str, *paths: str, text: str = "What is this?") -> dict:
    """A row: pictures, a question, an answer."""
    parts = [{"type": "image", "image": path} for path in paths]
    return {
        "messages": [
            {"role": "user", "content": [*parts, {"type": "text", "text": text}]},
            {"role": "assistant", "content": answer},
        ]
    }
