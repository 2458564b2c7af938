# ruff: noqa: N815 (fields carry their shape)
"""A prompt as the model reads it: token ids, and the pictures whose patches stand in the places of its image tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from collections.abc import Sequence as Listing
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from minnow.config import UserError
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import VisionLanguageModel
from minnow.tokenizer.chat import Rendered
from minnow.tokenizer.tokenizer import Tokenizer


class Seen(NamedTuple):
    """Some of a picture's image tokens: of its patches `first` to `end`, the first of them at `place` of the prompt."""

    picture: int
    first: int
    end: int
    place: int


@dataclass(frozen=True, eq=False)
class PromptImages:
    """The pictures of a prompt, in the order in which they stand in it."""

    pixels_ICHW: np.ndarray
    """uint8 [I, 3, size, size]."""
    starts: tuple[int, ...]
    """Place of each picture's first token in the prompt; the others follow it."""
    num_tokens: int
    """Image tokens of a picture."""
    digests: tuple[bytes, ...]
    """SHA-256 of each file: pictures have the same tokens, and this tells them apart."""

    def between(self, start: int, end: int) -> Iterator[Seen]:
        """What of which pictures stands at `start` to `end` of the prompt."""
        for picture, place in enumerate(self.starts):
            first, last = max(start, place), min(end, place + self.num_tokens)
            if first < last:
                yield Seen(picture, first - place, last - place, first)


@dataclass(frozen=True, eq=False)
class ReadyPrompt:
    """What `Engine.ready` makes of a prompt."""

    ids: list[int]
    images: PromptImages | None = None


Prompt = str | Listing[int] | Rendered
"""Token ids, taken as they are; a text, taken as the start of a document: the end-of-text token, then the text; or a
conversation as `render` gives it, whose pictures are looked at."""


def ready_prompt(model: CausalLM, tokenizer: Tokenizer, prompt: Prompt) -> ReadyPrompt:
    """The prompt as `model` will read it; pictures are decoded here.

    UserError for a picture that cannot be read, for pictures shown to a model that only reads, and where the image
    tokens are not those of the pictures.
    """
    ids = prompt_ids(tokenizer, prompt)
    files = prompt.images if isinstance(prompt, Rendered) else ()
    if not isinstance(model, VisionLanguageModel):
        if files:
            raise UserError("the model reads text only, and was shown a picture: `minnow vlm` teaches a model to see")
        return ReadyPrompt(ids)
    image_format = model.image_format
    size = image_format.num_tokens
    places_M = np.flatnonzero(np.array(ids, dtype=np.int64) == model.image_token_id)
    # Fewer in a row than a picture has are what the model wrote in an earlier turn: tokens like others, as then.
    runs = [run for run in np.split(places_M, np.flatnonzero(np.diff(places_M) > 1) + 1) if len(run) >= size]
    starts = [int(start) for run in runs for start in run[::size]]
    if len(starts) != len(files) or any(len(run) % size for run in runs):
        raise UserError(
            f"the prompt's {len(places_M)} image tokens are not those of {len(files)} pictures, {size} each: pictures "
            "are shown in a conversation, as `render` gives it, and not by their tokens"
        )
    if not files:
        return ReadyPrompt(ids)
    pixels_ICHW = np.stack([image_format.pixels(data) for data in files])
    digests = tuple(hashlib.sha256(data).digest() for data in files)
    return ReadyPrompt(ids, PromptImages(pixels_ICHW, tuple(starts), size, digests))


def prompt_ids(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Its tokens alone."""
    if isinstance(prompt, str):
        return [tokenizer.start_id, *tokenizer.encode(prompt)]
    return prompt.ids.tolist() if isinstance(prompt, Rendered) else [int(token) for token in prompt]
