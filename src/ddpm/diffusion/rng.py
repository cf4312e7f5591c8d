"""Random numbers that depend only on a seed and an index, not on what was drawn before."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_rng(seed: int, stream: str, index: int) -> torch.Generator:
    """A generator on the CPU for item `index` of the stream of that name. What it draws depends on these three arguments only.

    Nothing is carried from one training step or image to the next. So a resumed run needs no saved generator, and neither batch
    size nor device changes a draw. Consecutive indices use consecutive seeds, so a stream doesn't repeat itself.
    """
    start = int.from_bytes(hashlib.sha256(f"{stream}/{seed}".encode()).digest()[:4])
    return torch.Generator().manual_seed((start + index) % 2**32)  # PyTorch's Mersenne Twister uses 32 bits of the seed


class ImageNoise:
    """New Gaussian noise [count, *shape] at every call, for the images `first`, `first + 1` … of a seed.

    Image i's noise depends only on the seed and i, so it is the same in any batch and on any device.
    """

    def __init__(self, seed: int, first: int, count: int, shape: Sequence[int], device: torch.device):
        self.generators = [seeded_rng(seed, "sample", first + i) for i in range(count)]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
