"""A tiny model that looks at pictures, one-coloured pictures and the packed rows that hold them."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from minnow.data.batches import Batch
from minnow.data.records import conversation_row
from minnow.model.config import ModelConfig
from minnow.model.pretrained import save_pretrained
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.model.vision_tower import VisionConfig
from minnow.tokenizer import Conversation, Message, Tokenizer
from minnow.tokenizer.chat import Rendered, training_examples
from minnow.tokenizer.images import Image
from tests.stages.stage_helpers import tiny_tokenizer

TOWER = {"image_size": 8, "patch_size": 4, "hidden_size": 16, "intermediate_size": 24}
TOWER |= {"num_hidden_layers": 3, "num_attention_heads": 2}
COLOURS = {"red": (220, 30, 30), "green": (30, 200, 40), "blue": (40, 50, 220)}


def shape(tokenizer: Tokenizer, **changes: object) -> ModelConfig:
    settings: dict[str, object] = {
        "vocab_size": tokenizer.vocab_size,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 16,
        "max_position_embeddings": 64,
    }
    return ModelConfig(**(settings | changes))  # type: ignore[arg-type]


def reading_model(folder: Path, seed: int = 0) -> Path:
    """A language model without eyes; its matrices do not start at zero, so that everything has a gradient."""
    model = CausalLM(shape(tiny_tokenizer()), seed=seed)
    stirred(model, seed)
    save_pretrained(model, folder, tiny_tokenizer())
    return folder


def seeing(seed: int = 0, **changes: object) -> tuple[VisionLanguageModel, Tokenizer]:
    """A model with eyes and its tokenizer."""
    tokenizer = tiny_tokenizer()
    vision = VisionConfig(**TOWER)
    image_id = tokenizer.special_ids["<|image_pad|>"]
    model = VisionLanguageModel(shape(tokenizer, **changes), vision, image_id, seed=seed)
    tokenizer.image_format = model.image_format
    stirred(model, seed)
    return model, tokenizer


def seeing_model(folder: Path, seed: int = 0, **changes: object) -> Path:
    model, tokenizer = seeing(seed, **changes)
    save_pretrained(model, folder, tokenizer)
    return folder


@torch.no_grad()
def stirred(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))


def picture(colour: tuple[int, int, int] | np.ndarray) -> bytes:
    """A PNG of one colour."""
    file = io.BytesIO()
    PIL.Image.new("RGB", (10, 6), tuple(int(value) for value in colour)).save(file, "PNG")
    return file.getvalue()


def shade(name: str, generator: np.random.Generator) -> tuple[int, int, int]:
    """The colour, a little lighter or darker."""
    noise = generator.integers(-30, 31, 3)
    red, green, blue = (
        int(np.clip(value + change, 0, 255)) for value, change in zip(COLOURS[name], noise, strict=True)
    )
    return red, green, blue


def asked(*pictures: bytes, answer: str = "red", question: str = "colour?") -> Conversation:
    """Pictures before the question, and the answer."""
    images = tuple(Image(data) for data in pictures)
    return Conversation((Message("user", question, images=images), Message("assistant", answer)))


def mixed(number: int, seed: int = 0) -> list[Conversation]:
    """Conversations with none, one and two pictures in turn."""
    generator = np.random.default_rng(seed)
    names = list(COLOURS)
    conversations = []
    for index in range(number):
        chosen = [names[generator.integers(3)] for _ in range(index % 3)]
        pictures = [picture(shade(name, generator)) for name in chosen]
        conversations.append(asked(*pictures, answer=" ".join(chosen) or f"nothing {index}"))
    return conversations


def write_rows(file: Path, conversations: Sequence[Conversation]) -> Path:
    """The conversations as data to train on."""
    lines = [json.dumps(conversation_row(conversation)) + "\n" for conversation in conversations]
    file.write_text("".join(lines))
    return file


class PictureRows:
    """Rows of one conversation each, put together here: what the data's own packing is compared with."""

    def __init__(self, tokenizer: Tokenizer, conversations: Sequence[Conversation], length: int = 64) -> None:
        self.tokenizer, self.length = tokenizer, length
        self.examples: list[Rendered] = [e for c in conversations for e in training_examples(tokenizer, c)]
        self.num_rows = len(self.examples)

    @property
    def window_rows(self) -> Iterator[int]:
        yield self.num_rows

    def window_fill(self, number: int) -> float:
        return sum(len(example.ids) - 1 for example in self.examples) / (self.num_rows * self.length)

    def batch(self, row_indices: Sequence[int] | np.ndarray) -> Batch:
        examples = [self.examples[int(index)] for index in row_indices]
        B, T = len(examples), self.length
        tokens, targets, positions = (np.zeros((B, T), np.int64) for _ in range(3))
        weights, filler = np.zeros((B, T), np.float32), np.ones((B, T), bool)
        borders, places, pixels = [0], [], []
        for row, example in enumerate(examples):
            length = len(example.ids) - 1
            assert length <= T
            tokens[row, :length], targets[row, :length] = example.ids[:-1], example.ids[1:]
            weights[row, :length], filler[row, :length] = example.weights[1:], False
            positions[row] = [*range(length), *range(T - length)]
            borders += [row * T + length, (row + 1) * T] if length < T else [(row + 1) * T]
            if example.images:
                assert self.tokenizer.image_format is not None
                pixels += [self.tokenizer.image_format.pixels(data) for data in example.images]
                places += [row * T + int(at) for at in np.flatnonzero(example.ids == self.tokenizer.image_id)]
        targets[weights == 0] = 0
        return Batch(
            tokens_BT=torch.from_numpy(tokens),
            targets_BT=torch.from_numpy(targets),
            weights_BT=torch.from_numpy(weights),
            positions_BT=torch.from_numpy(positions),
            cu_seqlens=torch.tensor(borders, dtype=torch.int32),
            filler_BT=torch.from_numpy(filler),
            document_ids=tuple((int(index),) for index in row_indices),
            pixels_ICHW=torch.from_numpy(np.stack(pixels)) if pixels else None,
            image_places_M=torch.tensor(places) if places else None,
        )
