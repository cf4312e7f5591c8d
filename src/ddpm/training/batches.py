"""What each training step draws, and a thread that draws one step ahead."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, Self

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import seeded_rng
from ddpm.params import TrainParams
from ddpm.runtime.distributed import Group


class Draw(NamedTuple):
    """The random numbers of one step, for a batch of B images."""

    indices: Tensor  # int64 [B], of training images
    t: Tensor  # int64 [B], timesteps
    eps: Tensor  # float [B, C, H, W], noise
    dropped: Tensor  # bool [B], images shown without their class
    mirrored: Tensor  # bool [B], images shown mirrored


def draw(p: TrainParams, step: int, images: int, shape: tuple[int, int, int], diffusion: Diffusion, mirror: bool = False) -> Draw:
    """The draw of training step `step` from `images` images, on the CPU. It depends on (p.seed, step) alone.

    Two things make the loss less noisy without changing its mean. Timesteps are drawn as often as the loss weights them,
    instead of evenly and then weighted (importance sampling). And they are stratified: one from each B-th of their distribution
    (Kingma et al. 2021, app. I.1).
    """
    g = seeded_rng(p.seed, "train", step)
    indices = torch.randint(images, (p.batch_size,), generator=g)
    strata = (torch.arange(p.batch_size) + torch.rand(p.batch_size, generator=g)) / p.batch_size
    t = diffusion.timesteps_at(strata)
    eps = torch.randn(p.batch_size, *shape, generator=g)
    dropped = torch.rand(p.batch_size, generator=g) < p.label_dropout
    mirrored = (torch.rand(p.batch_size, generator=g) < 0.5) & mirror
    return Draw(indices, t, eps, dropped, mirrored)


class Batches:
    """This rank's share of the draws of consecutive steps. `next` returns one and starts drawing the one after it.

    A thread draws ahead because drawing a batch takes the host about as long as launching a step on a GPU.
    """

    def __init__(self, p: TrainParams, data: Dataset, diffusion: Diffusion, device: torch.device, group: Group, first_step: int):
        self.p, self.data, self.diffusion, self.device, self.group = p, data, diffusion, device, group
        self.step = first_step
        self.thread = ThreadPoolExecutor(1)
        self.upcoming = self.thread.submit(self._draw, first_step)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown()

    def next(self) -> Draw:
        """Indices where the images are, everything else on the device of the model."""
        drawn, self.step = self.upcoming.result(), self.step + 1
        self.upcoming = self.thread.submit(self._draw, self.step)
        places = (self.data.images.device, *4 * [self.device])
        on_cuda = self.device.type == "cuda"
        return Draw(*(x.to(place, non_blocking=on_cuda) for x, place in zip(drawn, places, strict=True)))

    def _draw(self, step: int) -> Draw:
        drawn = draw(self.p, step, len(self.data.images), self.data.image_shape, self.diffusion, self.data.mirror)
        shares = [self.group.shard(x) for x in drawn]
        on_cuda = self.device.type == "cuda"
        return Draw(*(x.pin_memory() if on_cuda else x for x in shares))  # pinned: the copy doesn't wait for the device
