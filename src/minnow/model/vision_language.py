# ruff: noqa: N815 (names carry their shape)
"""A decoder that also looks at pictures: LLaVA's way (2304.08485), transformers' `LlavaForConditionalGeneration`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from minnow.model.attention import Attention
from minnow.model.config import ModelConfig
from minnow.model.init import InitConfig, initialize
from minnow.model.transformer import CausalLM, ImageEmbeddings
from minnow.model.vision_tower import Projector, VisionConfig, VisionTower, from_uint8
from minnow.tokenizer.images import MEAN, STD, ImageFormat

Trained = Literal["projector", "language", "all"]


@dataclass(frozen=True)
class ImagePixels:
    """The pictures of a batch, and where in it their patches stand."""

    pixels_ICHW: Tensor
    """uint8 [images, 3, size, size]."""
    places_M: Tensor
    """int64 [images * patches]: places in the flattened batch, picture after picture."""


class VisionLanguageModel(CausalLM):
    """A language model with a vision tower; a picture's patches stand in the places of its image tokens.

    vision: shape of the tower. image_token_id: the token that stands for a patch. Without pictures it computes what the
    language model in it does.
    """

    def __init__(
        self,
        config: ModelConfig,
        vision: VisionConfig,
        image_token_id: int,
        init: InitConfig | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__(config, init, seed)
        self.vision, self.image_token_id = vision, image_token_id
        self.vision_tower = VisionTower(vision)
        self.multi_modal_projector = Projector(vision.hidden_size, config.hidden_size)
        for part in self.vision_modules:
            initialize(part, init or InitConfig(), seed + 1)

    @classmethod
    def from_language_model(
        cls,
        model: CausalLM,
        vision: VisionConfig,
        image_token_id: int,
        seed: int = 0,
        tower: VisionTower | None = None,
    ) -> VisionLanguageModel:
        """Give the decoder of `model`, which is taken over and not copied, a fresh projector and a fresh tower, or a
        trained `tower` of the shape `vision`, which is taken over too."""
        with torch.device("meta"):
            seeing = cls(model.config, vision, image_token_id)
        seeing.model, seeing.lm_head = model.model, model.lm_head
        seeing.compute_dtype, seeing.generation_config = model.compute_dtype, model.generation_config
        fresh = seeing.vision_modules
        if tower is not None:
            seeing.vision_tower, fresh = tower, (seeing.multi_modal_projector,)
        for part in fresh:
            part.to_empty(device=model.head_weight.device)
            initialize(part, InitConfig(), seed)
        return seeing

    @property
    def vision_modules(self) -> tuple[nn.Module, ...]:
        """Tower and projector: what the language model does not have."""
        return self.vision_tower, self.multi_modal_projector

    @property
    def image_format(self) -> ImageFormat:
        """What pictures have to be brought to."""
        return ImageFormat(self.vision.image_size, self.vision.patch_size)

    def train_only(self, trained: Trained | None) -> None:
        """Choose what learns: the projector alone, the language model too, or the tower as well; None: all but the two.

        The layers of the tower that no picture goes through never do.
        """
        self.requires_grad_(trained != "projector")
        self.multi_modal_projector.requires_grad_(trained is not None)
        self.vision_tower.requires_grad_(trained == "all")
        for unused in self.vision_tower.vision_model.unused():
            unused.requires_grad_(False)

    def embed_images(self, pixels_ICHW: Tensor) -> Tensor:
        """Pictures as uint8 [I, 3, size, size] -> what stands in their places, [I * patches, D], in compute_dtype."""
        pixels_ICHW = from_uint8(pixels_ICHW, MEAN, STD, self.compute_dtype)
        patches_IPD = self.vision_tower(pixels_ICHW, self.gradient_checkpointing if torch.is_grad_enabled() else "off")
        return self.multi_modal_projector(patches_IPD).flatten(0, 1)

    def forward(
        self,
        tokens_BT: Tensor,
        positions_BT: Tensor,
        attention: Attention,
        *,
        allow_beyond_trained_length: bool = False,
        images: ImagePixels | ImageEmbeddings | None = None,
    ) -> Tensor:
        """As `CausalLM.forward`; `images` as pixels are looked at here, so that every process gathers the tower."""
        if isinstance(images, ImagePixels):
            images = ImageEmbeddings(images.places_M, self.embed_images(images.pixels_ICHW))
        hidden_BTD = super().forward(
            tokens_BT,
            positions_BT,
            attention,
            allow_beyond_trained_length=allow_beyond_trained_length,
            images=images,
        )
        if images is None and torch.is_grad_enabled():
            # A gradient of 0 for all that looks and learns: processes that meet in a backward pass expect one of each.
            learning = [weight for part in self.vision_modules for weight in part.parameters() if weight.requires_grad]
            if learning:
                nothing = torch.stack([weight.flatten()[0] for weight in learning]).sum() * 0.0
                hidden_BTD = hidden_BTD + nothing.to(hidden_BTD.dtype)
        return hidden_BTD
