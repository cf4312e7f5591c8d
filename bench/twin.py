"""diffusers' UNet2DModel rebuilt block for block from this project's blocks: the same work, to compare how fast it is done."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from contenders import NULL_CLASS
from ddpm.diffusion.unet import Attention, ResBlock, timestep_embedding


class Twin(nn.Module):
    """UNet2DModel(block_out_channels=(32, 64, 128)) with attention at all levels but the first; see `contenders.unet2d`.

    Like that it attends in heads of 8 channels, or else in as many `heads` as are asked for, with the same weights and work.
    """

    def __init__(self, channels: tuple[int, ...] = (32, 64, 128), layers: int = 2, groups: int = 8, heads: int | None = None):
        super().__init__()
        embedding = 4 * channels[0]
        self.width = channels[0]
        self.time = nn.Sequential(nn.Linear(channels[0], embedding), nn.SiLU(), nn.Linear(embedding, embedding))
        self.classes = nn.Embedding(NULL_CLASS + 1, embedding)
        self.stem = nn.Conv2d(1, channels[0], 3, padding=1)

        def block(channels_in: int, channels_out: int, attend: bool) -> nn.ModuleList:
            attention = Attention(channels_out, heads or channels_out // 8, groups) if attend else nn.Identity()
            return nn.ModuleList([ResBlock(channels_in, channels_out, embedding, 0.0, groups), attention])

        self.down, self.up = nn.ModuleList(), nn.ModuleList()
        self.shrink, self.grow = nn.ModuleList(), nn.ModuleList()
        width, skips = channels[0], [channels[0]]
        for i, c in enumerate(channels):
            self.down.append(nn.ModuleList(block(width if b == 0 else c, c, i > 0) for b in range(layers)))
            skips += [c] * layers
            width = c
            if i < len(channels) - 1:
                self.shrink.append(nn.Conv2d(c, c, 3, stride=2, padding=1))
                skips.append(c)
        self.middle = nn.ModuleList([*block(width, width, True), block(width, width, False)[0]])
        for i, c in reversed(list(enumerate(channels))):
            blocks = nn.ModuleList()
            for _ in range(layers + 1):
                blocks.append(block(width + skips.pop(), c, i > 0))
                width = c
            self.up.append(blocks)
            if i > 0:
                self.grow.append(nn.Conv2d(c, c, 3, padding=1))
        self.norm = nn.GroupNorm(groups, width)
        self.head = nn.Conv2d(width, 1, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        emb = F.silu(self.time(timestep_embedding(t, self.width)) + self.classes(y))
        h = self.stem(x)
        skips = [h]
        for i, blocks in enumerate(self.down):
            for block, attend in blocks:
                h = attend(block(h, emb))
                skips.append(h)
            if i < len(self.shrink):
                h = self.shrink[i](h)
                skips.append(h)
        first, attend, second = self.middle
        h = second(attend(first(h, emb)), emb)
        for i, blocks in enumerate(self.up):
            for block, attend in blocks:
                h = attend(block(torch.cat([h, skips.pop()], dim=1), emb))
            if i < len(self.grow):
                h = self.grow[i](F.interpolate(h, scale_factor=2))
        return self.head(F.silu(self.norm(h)))
