"""Pixels are uint8 in files and float in [-1, 1] for the network; these functions convert them."""

import torch
from torch import Tensor


def channels_first(images: Tensor) -> Tensor:
    """[N, H, W] or [N, H, W, 3] → [N, C, H, W]."""
    return images.unsqueeze(1) if images.ndim == 3 else images.movedim(3, 1)


def to_model_range(images: Tensor) -> Tensor:
    """uint8 [N, H, W] or [N, H, W, 3] → float32 [N, C, H, W] in [-1, 1]."""
    return channels_first(images).float() / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """Float [N, C, H, W] in [-1, 1] → uint8 [N, H, W] or [N, H, W, 3]. Values are rounded, and clipped if out of range."""
    x = x.squeeze(1) if x.shape[1] == 1 else x.movedim(1, 3)
    return ((x.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).contiguous()
