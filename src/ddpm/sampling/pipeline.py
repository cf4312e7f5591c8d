"""One batch of images from a trained model. `src/sample.py` draws thousands with it, the server a few on request."""

from collections.abc import Callable, Iterator
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
LARGE = 64  # pixels along a side; of larger images fewer are denoised together, so that they take no more memory


class Pipeline:
    """A trained model with everything that it takes to draw images. Raises UserError if the file isn't a model."""

    def __init__(self, file: Path, device: torch.device):
        self.file, self.device = file, device
        checkpoint = load_checkpoint(file, device)
        self.model, self.guide, self.diffusion = checkpoint.model, checkpoint.guide, checkpoint.diffusion
        self.label_dropout, self.classes = checkpoint.label_dropout, checkpoint.classes
        self.null_class, self.image_shape = self.model.null_class, self.model.image_shape
        size = self.image_shape[1]
        self.batch_size = CUDA_BATCH if device.type == "cuda" and size <= 32 else BATCH  # larger ones keep a GPU busy as well
        if size > LARGE:
            self.batch_size = max(10, BATCH * LARGE**2 // size**2)  # the animation shows the first ten

    def check(self, p: SampleParams) -> None:
        """Raise UserError if `p` asks for something that this model can't do."""
        timesteps = self.diffusion.timesteps
        if p.steps > timesteps:
            raise UserError(f"sample.steps: {p.steps}, but {self.file} has {timesteps} timesteps; use at most as many")
        try:
            p.check(self.null_class, str(self.file))
        except ValueError as error:
            raise UserError(str(error)) from None
        if self.label_dropout == 1 and p.class_ids(self.null_class):
            raise UserError(f"sample.classes: {self.file} was trained without classes; set it to none")
        if self.label_dropout == 0 and (not p.class_ids(self.null_class) or p.guidance_scale != 1):
            raise UserError(f"{self.file} never trained without classes: sample.guidance_scale must be 1, and classes not none")

    def class_ids(self, p: SampleParams) -> list[int]:
        """The classes that `p` asks for; the null class if it asks for none."""
        return p.class_ids(self.null_class) or [self.null_class]

    def iter_samples(self, labels: Tensor, p: SampleParams, first: int = 0) -> Iterator[Tensor]:
        """Images `first`, `first + 1` … of seed `p.seed` for classes int64 [N]: the noise x_T, then x_t after every step.

        Each is float [N, C, H, W]; the last one is the samples, in [-1, 1], except where the sampler overshoots.
        """
        noise = ImageNoise(p.seed, first, len(labels), self.image_shape, self.device)
        x_T = noise()
        yield x_T
        draws = chain([x_T], iter(noise, None))  # the sampler starts from the same x_T, then draws new noise
        for x, _ in self.iter_steps(labels, p, lambda: next(draws)):
            yield x

    def iter_steps(
        self, labels: Tensor, p: SampleParams, noise: Callable[[], Tensor], model: Callable | None = None
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """x_t and the estimate x̂0 of the clean images after every step, both float [N, C, H, W], for classes int64 [N].

        `noise()` gives x_T first, then what the sampler adds. `model` takes the place of the network, such as a mixture of two.
        """
        return iter_samples(
            model or self.model, self.diffusion, labels.to(self.device), self.null_class, noise,
            p.sampler, p.steps, p.spacing, p.eta, p.variance, p.clip,
            guidance_scale=self.guidance(p), guidance_interval=p.guidance_interval, guide=self.guide,
        )  # fmt: skip

    def guidance(self, p: SampleParams) -> float:
        """The guidance scale of `p`, or 1 if there is nothing to guide by: no guide, and no class."""
        return p.guidance_scale if self.guide is not None or p.class_ids(self.null_class) else 1.0


def label_batches(classes: list[int], count: int, size: int = BATCH) -> list[tuple[int, Tensor]]:
    """For every batch the number of its first image and its labels int64 [N]. Classes take turns from image to image."""
    labels = torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
    return list(zip(range(0, count, size), labels.split(size), strict=True))
