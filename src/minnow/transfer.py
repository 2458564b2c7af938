"""From the host to the device without making the host wait."""

from __future__ import annotations

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return `tensor` on `device`. A copy from the CPU to CUDA goes through page-locked memory and is only begun here.

    From ordinary memory it would first wait for all the work that the device has before it; from page-locked memory it
    takes its place behind that work, and the host goes on. torch keeps the page-locked copy until it has been read.
    """
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
