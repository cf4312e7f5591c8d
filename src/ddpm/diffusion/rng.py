"""Random numbers that depend on a seed and an index alone."""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


def seeded_rng(seed: int, stream: str, index: int) -> torch.Generator:
    """A CPU generator for item `index` of a named stream: what it draws depends on these three alone.

    Nothing is carried from one training step or image to the next, so a resumed run needs no generator's state, and
    batch size or device change no draw. Neighbouring indices take neighbouring seeds, so a stream never repeats itself.
    """
    start = int.from_bytes(hashlib.sha256(f"{stream}/{seed}".encode()).digest()[:4])
    return torch.Generator().manual_seed((start + index) % 2**32)  # the CPU's Mersenne twister takes 32 bits


class ImageNoise:
    """Gaussian noise [N, *shape] for images `first` … `first + count - 1` of a sampling run, drawn again at every call.

    Image i's stream depends on (seed, i) alone, whatever batch it is in and whatever device it is made on.
    """

    def __init__(self, seed: int, first: int, count: int, shape: Sequence[int], device: torch.device):
        self.generators = [seeded_rng(seed, "sample", first + i) for i in range(count)]
        self.shape, self.device = tuple(shape), device

    def __call__(self) -> Tensor:
        return torch.stack([torch.randn(self.shape, generator=g) for g in self.generators]).to(self.device)
