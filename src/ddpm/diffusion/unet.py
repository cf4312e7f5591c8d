"""The denoiser: a U-Net with residual blocks, attention at the low resolutions, and timestep and class conditioning.

As in Ho et al. 2020, app. B, but with scale-shift conditioning (Dhariwal and Nichol 2021, sec. 4.3) and, if asked for, a
pixel-unshuffle at the input. It turns 28×28 pixels of one channel into 14×14 of four, because a U-Net of small images takes most
of its time at the highest resolution, but learns most at the lower ones.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def timestep_embedding(t: Tensor, width: int, max_period: float = 10_000) -> Tensor:
    """Sines and cosines [N, width] of timesteps [N] at geometrically spaced frequencies (Vaswani et al. 2017, sec. 3.5)."""
    frequencies = torch.exp(-math.log(max_period) * torch.arange(width // 2, device=t.device) / (width // 2))
    angles = t[:, None].float() * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


def zeroed(module: nn.Module) -> nn.Module:
    """`module` with all its parameters set to zero: the last layer of a residual branch, which then starts as the identity."""
    for p in module.parameters():
        nn.init.zeros_(p)
    return module


class ResBlock(nn.Module):
    """[N, C_in, H, W] and a conditioning vector [N, E] → [N, C_out, H, W]."""

    def __init__(self, channels_in: int, channels_out: int, embedding: int, dropout: float, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, padding=1)
        self.condition = nn.Linear(embedding, 2 * channels_out)
        self.norm2 = nn.GroupNorm(groups, channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zeroed(nn.Conv2d(channels_out, channels_out, 3, padding=1))
        self.shortcut = nn.Conv2d(channels_in, channels_out, 1) if channels_in != channels_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        scale, shift = self.condition(emb)[:, :, None, None].chunk(2, dim=1)
        h = torch.addcmul(shift, self.norm2(h), 1 + scale)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class Attention(nn.Module):
    """Multi-head self-attention among the H·W positions of [N, C, H, W]."""

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = zeroed(nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        n, c, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [N, H·W, C]
        q, k, v = self.qkv(tokens).view(n, height * width, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)  # [N, heads, H·W, C / heads]
        h = self.out(h.transpose(1, 2).reshape(n, height * width, c))
        return x + h.transpose(1, 2).view(n, c, height, width)


class UNet(nn.Module):
    """Images float [N, C, H, W], timesteps int64 [N], classes int64 [N] → the prediction [N, C, H, W].

    The class number `classes`, one more than the last one, is the null class: it stands for any class.
    """

    def __init__(
        self,
        channels: Sequence[int] = (48, 96),  # width of each level; each level has half the resolution of the one before
        blocks: int = 2,  # residual blocks per level, on the way down and again on the way up
        attention: Sequence[int] = (7,),  # resolutions with self-attention after each block
        heads: int = 4,
        dropout: float = 0.0,
        patch_size: int = 2,  # of the pixel-unshuffle at the input; 1 for none
        classes: int = 10,
        image_size: int = 28,
        image_channels: int = 1,
        groups: int = 8,
    ):
        super().__init__()
        embedding = 2 * channels[0]
        self.base_width, self.patch_size = channels[0], patch_size
        self.null_class, self.image_shape = classes, (image_channels, image_size, image_size)
        self.embed_time = nn.Sequential(nn.Linear(channels[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.embed_class = nn.Embedding(classes + 1, embedding)
        self.stem = nn.Conv2d(image_channels * patch_size**2, channels[0], 3, padding=1)

        def level(channels_in: int, channels_out: int, size: int) -> nn.ModuleList:
            block = ResBlock(channels_in, channels_out, embedding, dropout, groups)
            return nn.ModuleList([block, Attention(channels_out, heads, groups) if size in attention else nn.Identity()])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.downsample, self.upsample = nn.ModuleList(), nn.ModuleList()
        width, size, skips = channels[0], image_size // patch_size, []
        for i, c in enumerate(channels):
            if i > 0:
                self.downsample.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                size //= 2
            self.down.append(nn.ModuleList(level(width if b == 0 else c, c, size) for b in range(blocks)))
            skips += [c] * blocks
            width = c
        self.middle1 = ResBlock(width, width, embedding, dropout, groups)
        self.middle_attention = Attention(width, heads, groups)
        self.middle2 = ResBlock(width, width, embedding, dropout, groups)
        for i, c in reversed(list(enumerate(channels))):
            self.up.append(nn.ModuleList(level((width if b == 0 else c) + skips.pop(), c, size) for b in range(blocks)))
            width = c
            if i > 0:
                self.upsample.append(nn.ConvTranspose2d(width, width, 2, stride=2))  # no overlap, so no checkerboard
                size *= 2
        self.norm = nn.GroupNorm(groups, width)
        self.head = zeroed(nn.Conv2d(width, image_channels * patch_size**2, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        emb = F.silu(self.embed_time(timestep_embedding(t, self.base_width)) + self.embed_class(y))
        h = self.stem(F.pixel_unshuffle(x, self.patch_size))
        skips = []
        for i, blocks in enumerate(self.down):
            if i > 0:
                h = self.downsample[i - 1](h)
            for block, attend in blocks:  # type: ignore[attr-defined]  # of a ModuleList of ModuleLists
                h = attend(block(h, emb))
                skips.append(h)
        h = self.middle2(self.middle_attention(self.middle1(h, emb)), emb)
        for i, blocks in enumerate(self.up):
            if i > 0:
                h = self.upsample[i - 1](h)
            for block, attend in blocks:  # type: ignore[attr-defined]
                h = attend(block(torch.cat([h, skips.pop()], dim=1), emb))
        return F.pixel_shuffle(self.head(F.silu(self.norm(h))), self.patch_size)
