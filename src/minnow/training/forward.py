"""A packed batch through a model, with the pictures that stand in it."""

from __future__ import annotations

from torch import Tensor

from minnow.data.batches import Batch
from minnow.model.attention import PackedAttention
from minnow.model.transformer import CausalLM
from minnow.model.vision_language import ImagePixels, VisionLanguageModel


def hidden_states(model: CausalLM, batch: Batch) -> Tensor:
    """Hidden states [B, T, D] of a batch on the model's device.

    All training goes through here, so that no objective leaves out a batch's pictures: an image token without its
    picture is a token that the model was never taught.
    """
    attention = PackedAttention(batch.cu_seqlens, batch.tokens_BT.device)
    pictures = images_of(batch)
    if pictures is None:
        hidden_BTD: Tensor = model(batch.tokens_BT, batch.positions_BT, attention)
    else:
        assert isinstance(model, VisionLanguageModel), (
            "pictures for a model that only reads: its tokenizer refuses them"
        )
        hidden_BTD = model(batch.tokens_BT, batch.positions_BT, attention, images=pictures)
    return hidden_BTD


def images_of(batch: Batch) -> ImagePixels | None:
    """The pictures of a batch and their places; None where there are none."""
    if batch.pixels_ICHW is None:
        return None
    assert batch.image_places_M is not None, "pictures come with their places"
    return ImagePixels(batch.pixels_ICHW, batch.image_places_M)
