"""Pictures in a step: a tower looks at each when its first token is read, and what it sees is kept for the request."""

from __future__ import annotations

from collections.abc import Sequence as Listing

import numpy as np
import torch

from minnow.engine.scheduler import Chunk
from minnow.engine.sequence import Request
from minnow.model.transformer import CausalLM, ImageEmbeddings
from minnow.model.vision_language import VisionLanguageModel
from minnow.transfer import to_device


def look(model: CausalLM, chunks: Listing[Chunk]) -> None:
    """Have `Request.seen` hold what stands in the places of the image tokens among these chunks.

    All pictures go through the tower in one pass, without those that were looked at already: a picture may be cut in
    two by the end of a step, be read again after a preemption, or stand in the prompt of several samples.
    """
    unseen: dict[tuple[Request, int], np.ndarray] = {}
    for chunk in chunks:
        request, images = chunk.sequence.request, chunk.sequence.request.images
        if images is not None:
            for part in images.between(chunk.start, chunk.start + chunk.count):
                if part.picture not in request.seen:
                    unseen[request, part.picture] = images.pixels_ICHW[part.picture]
    if not unseen:
        return
    assert isinstance(model, VisionLanguageModel)
    pixels_ICHW = to_device(torch.from_numpy(np.stack(list(unseen.values()))), model.head_weight.device)
    each_PD = model.embed_images(pixels_ICHW).chunk(len(unseen))
    for (request, picture), embeddings_PD in zip(unseen, each_PD, strict=True):
        request.seen[picture] = embeddings_PD


def seen_in(chunks: Listing[Chunk], offset: int) -> ImageEmbeddings | None:
    """What stands in the places of the image tokens of these chunks; None where there are none.

    offset: tokens that stand before the chunks in the forward pass.
    """
    places: list[int] = []
    embeddings: list[torch.Tensor] = []
    for chunk in chunks:
        request, images = chunk.sequence.request, chunk.sequence.request.images
        if images is not None:
            for part in images.between(chunk.start, chunk.start + chunk.count):
                place = offset + part.place - chunk.start
                places.extend(range(place, place + part.end - part.first))
                embeddings.append(request.seen[part.picture][part.first : part.end])
        offset += chunk.count
    if not embeddings:
        return None
    embeddings_MD = torch.cat(embeddings)
    return ImageEmbeddings(to_device(torch.tensor(places), embeddings_MD.device), embeddings_MD)
