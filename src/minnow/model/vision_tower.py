"""SigLIP's vision transformer (2303.15343): a picture in patches, each a vector; modules bear transformers' names."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minnow.config import UserError
from minnow.model.checkpointing import GradientCheckpointing, checkpointed
from minnow.model.transformer import Linear


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """Shape of a vision tower, in Hugging Face's names. The default is small enough to train from nothing on a CPU."""

    image_size: int = 64
    """Pixels of a picture's edge: every picture is stretched to this square."""
    patch_size: int = 16
    """Pixels of a patch's edge; divides image_size. Every patch is one token of the text."""
    hidden_size: int = 128
    """Width of the tower."""
    intermediate_size: int = 512
    """Width of its MLPs."""
    num_hidden_layers: int = 5
    """Number of layers. The last is not used: it served what the tower was trained for (2304.08485, section 4.1)."""
    num_attention_heads: int = 4
    """Number of heads; divides hidden_size."""
    layer_norm_eps: float = 1e-6
    """Added to the variance inside LayerNorm."""
    vision_feature_layer: int = -2
    """Which layer's output is looked at, counted as transformers does: 0 is the embedding, -2 the last but one."""

    def __post_init__(self) -> None:
        for name in ("image_size", "patch_size", "hidden_size", "intermediate_size", "num_attention_heads"):
            if getattr(self, name) < 1:
                raise UserError(f"tower.{name} is {getattr(self, name)}: it must be at least 1")
        if self.image_size % self.patch_size:
            raise UserError(f"tower.patch_size ({self.patch_size}) must divide tower.image_size ({self.image_size})")
        if self.hidden_size % self.num_attention_heads:
            raise UserError(
                f"tower.num_attention_heads ({self.num_attention_heads}) must divide "
                f"tower.hidden_size ({self.hidden_size})"
            )
        if not 1 <= self.num_used_layers < self.num_hidden_layers:
            # Of the last layer's output transformers 4 means what stands before the last norm, 5 what stands after it.
            raise UserError(
                f"tower.vision_feature_layer {self.vision_feature_layer} of tower.num_hidden_layers "
                f"{self.num_hidden_layers}: it must be a layer before the last, such as -2"
            )

    @property
    def num_used_layers(self) -> int:
        """How many layers a picture goes through."""
        layer = self.vision_feature_layer
        return layer if layer >= 0 else self.num_hidden_layers + 1 + layer

    @property
    def num_patches(self) -> int:
        """Patches of a picture: its tokens."""
        return (self.image_size // self.patch_size) ** 2


class PatchEmbedding(nn.Conv2d):
    """A convolution whose steps do not overlap: one matrix for every patch."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__(3, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size)

    def reset_parameters(self) -> None:
        """Leave the memory as it is: `initialize` draws all weights at once."""

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> patches [I, P, D], row by row, in the pixels' dtype."""
        bias = None if self.bias is None else self.bias.to(pixels_ICHW.dtype)
        patches_IDhw = F.conv2d(pixels_ICHW, self.weight.to(pixels_ICHW.dtype), bias, self.stride)
        return patches_IDhw.flatten(2).transpose(1, 2)


class PositionEmbedding(nn.Embedding):
    """An embedding whose weights `initialize` draws."""

    def reset_parameters(self) -> None:
        """Leave the memory as it is."""


class LayerNorm(nn.LayerNorm):
    """In float32, whatever it is given."""

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> the same shape and dtype."""
        normed = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return normed.to(x.dtype)


class VisionEmbeddings(nn.Module):
    """Patches and their places."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.patch_embedding = PatchEmbedding(config)
        self.position_embedding = PositionEmbedding(config.num_patches, config.hidden_size)

    def forward(self, pixels_ICHW: Tensor) -> Tensor:
        """Pixels [I, 3, H, W] -> [I, P, D]."""
        return self.patch_embedding(pixels_ICHW) + self.position_embedding.weight.to(pixels_ICHW.dtype)


class VisionAttention(nn.Module):
    """Every patch sees every patch of its picture."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        width = config.hidden_size
        self.q_proj, self.k_proj = Linear(width, width), Linear(width, width)
        self.v_proj, self.out_proj = Linear(width, width), Linear(width, width)

    def forward(self, x_IPD: Tensor) -> Tensor:
        """x [I, P, D] -> [I, P, D]."""
        q, k, v = (
            projection(x_IPD).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )
        return self.out_proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(-2))


class VisionMLP(nn.Module):
    """Two matrices and a GELU between them (its tanh form)."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class VisionLayer(nn.Module):
    """Attention and MLP, each behind a norm and added to the stream."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layer_norm1 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.self_attn = VisionAttention(config)
        self.layer_norm2 = LayerNorm(config.hidden_size, config.layer_norm_eps)
        self.mlp = VisionMLP(config)

    def forward(self, x_IPD: Tensor) -> Tensor:
        """x [I, P, D] -> [I, P, D]."""
        x_IPD = x_IPD + self.self_attn(self.layer_norm1(x_IPD))
        return x_IPD + self.mlp(self.layer_norm2(x_IPD))


class VisionEncoder(nn.Module):
    """The layers."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.layers = nn.ModuleList(VisionLayer(config) for _ in range(config.num_hidden_layers))


class VisionTransformer(nn.Module):
    """transformers' `vision_model`, without the pooling head that only SigLIP's own training needs.

    What lies behind the layer that is looked at is kept as it came, so that other programs find it; it learns nothing.
    """

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = VisionEmbeddings(config)
        self.encoder = VisionEncoder(config)
        self.post_layernorm = LayerNorm(config.hidden_size, config.layer_norm_eps)

    def forward(self, pixels_ICHW: Tensor, mode: GradientCheckpointing = "off") -> Tensor:
        """Pixels from -1 to 1 [I, 3, H, W] -> patches [I, P, D], the output of the layer that is looked at.

        mode: what of each layer is kept for the backward pass.
        """
        x_IPD = self.embeddings(pixels_ICHW)
        for layer in self.encoder.layers[: self.config.num_used_layers]:
            x_IPD = checkpointed(mode, layer, x_IPD)
        return x_IPD

    def unused(self) -> list[nn.Module]:
        """The modules that no picture goes through."""
        return [*self.encoder.layers[self.config.num_used_layers :], self.post_layernorm]


class VisionTower(nn.Module):
    """transformers' `SiglipVisionModel`."""

    def __init__(self, config: VisionConfig) -> None:
        super().__init__()
        self.vision_model = VisionTransformer(config)

    def forward(self, pixels_ICHW: Tensor, mode: GradientCheckpointing = "off") -> Tensor:
        """Pixels from -1 to 1 [I, 3, H, W] -> patches [I, P, D]. mode: as `VisionTransformer`."""
        return self.vision_model(pixels_ICHW, mode)


class Projector(nn.Module):
    """From a patch to what stands in the place of a token's embedding: two matrices, a GELU between (2310.03744)."""

    def __init__(self, vision_width: int, width: int) -> None:
        super().__init__()
        self.linear_1 = Linear(vision_width, width)
        self.linear_2 = Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., vision width] -> [..., width]."""
        return self.linear_2(F.gelu(self.linear_1(x)))


def from_uint8(pixels_ICHW: Tensor, mean: float, std: float, dtype: torch.dtype) -> Tensor:
    """Stored pixels 0 to 255 as a tower reads them: (x / 255 - mean) / std."""
    return ((pixels_ICHW.float() / 255.0 - mean) / std).to(dtype)
