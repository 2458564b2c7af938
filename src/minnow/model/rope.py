"""Rotary position embedding (2104.09864), half-rotation layout as in Llama's and Qwen's checkpoints."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from minnow.model.config import RopeScaling


def rotary_tables(
    positions_BT: Tensor, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[Tensor, Tensor]:
    """Cosines and sines [B, T, 1, head_dim / 2] of each token's angles, fp32, shared by all heads and layers.

    Made anew from the positions in every forward pass: it is cheap, keeps no buffer that a change of the
    model's dtype could round, and has no largest position.
    """
    frequencies = rotary_frequencies(head_dim, theta, scaling, positions_BT.device)
    angles = positions_BT[..., None, None].float() * frequencies
    factor = scaling.attention_factor if scaling is not None and scaling.type == "yarn" else 1.0
    return angles.cos() * factor, angles.sin() * factor


def rotate(x_BTHd: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn the pairs (x[i], x[i + d/2]) by their angles, in fp32; returned in x's dtype."""
    first, second = x_BTHd.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BTHd.dtype)


@lru_cache(maxsize=64)
def rotary_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None, device: torch.device) -> Tensor:
    """Angle per position of each pair, fp32 [head_dim / 2]."""
    with torch.inference_mode(False):  # a cached inference tensor could not enter a later backward pass
        plain = 1.0 / theta ** (torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim)
        return (plain if scaling is None else _scale(plain, head_dim, theta, scaling)).to(device)


def _scale(plain: Tensor, head_dim: int, theta: float, scaling: RopeScaling) -> Tensor:
    """Frequencies w of the pairs [head_dim / 2], stretched by the factor s: w keep + (w / s) (1 - keep).

    linear: keep is 0. llama3: it rises with the turns of a pair within the trained length, from 0 at low_freq_factor
    to 1 at high_freq_factor. yarn: it falls with the number of the pair, from 1 where pairs turn beta_fast times to 0
    where they turn beta_slow times, as in the authors' code and transformers (2309.00071, section 3.2, has a ramp over
    the turns).
    """
    slow = plain / scaling.factor
    if scaling.type == "linear":
        return slow
    length = scaling.original_max_position_embeddings
    if scaling.type == "llama3":
        turns = length * plain / (2 * math.pi)
        smooth = (turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor)
        keep = smooth.clamp(0, 1)
    else:
        # The pair, by its number and not whole, whose frequency turns `beta` times within the trained length.
        def pair(beta: float) -> float:
            return head_dim * math.log(length / (beta * 2 * math.pi)) / (2 * math.log(theta))

        low = max(math.floor(pair(scaling.beta_fast)), 0)
        high = min(math.ceil(pair(scaling.beta_slow)), head_dim - 1)
        ramp = (torch.arange(head_dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
        keep = 1 - ramp.clamp(0, 1)
    return slow * (1 - keep) + plain * keep
