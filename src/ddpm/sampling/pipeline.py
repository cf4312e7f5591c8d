"""One batch of images from a trained model. `src/sample.py` draws thousands with it, the server a few on request."""

from collections.abc import Iterator
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from ddpm.checkpoint import load_checkpoint
from ddpm.diffusion.rng import ImageNoise
from ddpm.diffusion.samplers import iter_samples
from ddpm.errors import UserError
from ddpm.params import SampleParams

BATCH, CUDA_BATCH = 125, 500  # images denoised together; changes nothing beyond rounding


class Pipeline:
    """A trained model with everything that it takes to draw images. Raises UserError if the file isn't a model."""

    def __init__(self, file: Path, device: torch.device):
        self.file, self.device = file, device
        checkpoint = load_checkpoint(file, device)
        self.model, self.diffusion = checkpoint.model, checkpoint.diffusion
        self.label_dropout, self.classes = checkpoint.label_dropout, checkpoint.classes
        self.null_class, self.image_shape = self.model.null_class, self.model.image_shape
        small = self.image_shape[1] <= 32  # one batch of larger images is enough to keep a GPU busy
        self.batch_size = CUDA_BATCH if device.type == "cuda" and small else BATCH

    def check(self, p: SampleParams) -> None:
        """Raise UserError if `p` asks for something that this model can't do."""
        timesteps = self.diffusion.timesteps
        if p.steps > timesteps:
            raise UserError(f"sample.steps: {p.steps}, but {self.file} has {timesteps} timesteps; use at most as many")
        if self.label_dropout == 1 and p.classes != "none":
            raise UserError(f"sample.classes: {self.file} was trained without classes; set it to none")
        if isinstance(p.classes, list) and max(p.classes) >= self.null_class:
            raise UserError(f"sample.classes: {max(p.classes)}, but {self.file} has the classes 0 to {self.null_class - 1}")
        if p.count < (asked := len(self.class_ids(p))):
            raise UserError(f"sample.count: {p.count} images are fewer than the {asked} classes; use at least as many")
        if self.label_dropout == 0 and (p.classes == "none" or p.guidance_scale != 1):
            raise UserError(f"{self.file} never trained without classes: sample.guidance_scale must be 1, and classes not none")

    def class_ids(self, p: SampleParams) -> list[int]:
        """The classes that `p` asks for; the null class if it asks for none."""
        if isinstance(p.classes, list):
            return list(p.classes)
        every_class = list(range(self.null_class)) if p.classes == "all" else []
        return every_class or [self.null_class]

    def iter_samples(self, labels: Tensor, p: SampleParams, first: int = 0) -> Iterator[Tensor]:
        """Images `first`, `first + 1` … of seed `p.seed` for classes int64 [N]: the noise x_T, then x_t after every step.

        Each is float [N, C, H, W]; the last one is the samples, in [-1, 1], except where the sampler overshoots.
        """
        noise = ImageNoise(p.seed, first, len(labels), self.image_shape, self.device)
        x_T = noise()
        yield x_T
        draws = chain([x_T], iter(noise, None))  # the sampler starts from the same x_T, then draws new noise
        guidance = 1.0 if p.classes == "none" else p.guidance_scale  # without classes there is nothing to guide towards
        for x, _ in iter_samples(
            self.model, self.diffusion, labels.to(self.device), self.null_class, lambda: next(draws),
            p.sampler, p.steps, p.spacing, p.eta, p.variance, p.clip, guidance,
        ):  # fmt: skip
            yield x


def label_batches(classes: list[int], count: int, size: int = BATCH) -> list[tuple[int, Tensor]]:
    """For every batch the number of its first image and its labels int64 [N]. Classes take turns from image to image."""
    labels = torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
    return list(zip(range(0, count, size), labels.split(size), strict=True))
