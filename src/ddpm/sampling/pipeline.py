"""Images from a trained model: what `src/sample.py` draws by the thousand, and a server on request."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ddpm.checkpoint import load_model
from ddpm.diffusion.rng import ImageNoise
from ddpm.diffusion.samplers import iter_samples
from ddpm.errors import UserError
from ddpm.params import SampleParams

BATCH, CUDA_BATCH = 125, 500  # images denoised together; changes nothing beyond rounding


class Pipeline:
    """A trained model, ready to draw. Raises UserError where the file isn't one."""

    def __init__(self, checkpoint: Path, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        self.model, self.diffusion, self.label_dropout, self.classes = load_model(checkpoint, device)
        self.null_class, self.image_shape = self.model.null_class, self.model.image_shape
        small = self.image_shape[1] <= 32  # larger images keep a GPU busy as it is
        self.batch_size = CUDA_BATCH if device.type == "cuda" and small else BATCH

    def check(self, p: SampleParams) -> None:
        """Raise UserError where `p` asks of this model what it can't do."""
        timesteps, name = self.diffusion.timesteps, self.checkpoint
        if p.steps > timesteps:
            raise UserError(f"sample.steps: {p.steps}, but {name} has {timesteps} timesteps; use at most as many")
        if self.label_dropout == 1 and p.classes != "none":
            raise UserError(f"sample.classes: {name} was trained without classes; set it to none")
        if isinstance(p.classes, list) and max(p.classes) >= self.null_class:
            raise UserError(f"sample.classes: {max(p.classes)}, but {name} has the classes 0 to {self.null_class - 1}")
        if p.count < (asked := len(self.class_ids(p))):
            raise UserError(f"sample.count: {p.count} images are fewer than the {asked} classes; use at least as many")
        if self.label_dropout == 0 and (p.classes == "none" or p.guidance_scale != 1):
            raise UserError(f"{name} never trained without classes: sample.guidance_scale must be 1, and classes not none")

    def iter_samples(self, labels: Tensor, p: SampleParams, first: int = 0) -> Iterator[Tensor]:
        """Images `first`, `first + 1` … of `p.seed` for int64 labels [N]: [N, C, H, W] in [-1, 1] after every step."""
        noise = ImageNoise(p.seed, first, len(labels), self.image_shape, self.device)
        guidance = 1.0 if p.classes == "none" else p.guidance_scale  # towards no class is nowhere
        for x, _ in iter_samples(
            self.model, self.diffusion, labels.to(self.device), self.null_class, noise,
            p.sampler, p.steps, p.spacing, p.eta, p.variance, p.clip, guidance,
        ):  # fmt: skip
            yield x

    def class_ids(self, p: SampleParams) -> list[int]:
        """The classes that are asked for, `null_class` for none."""
        return {"all": list(range(self.null_class)), "none": [self.null_class]}.get(str(p.classes)) or list(p.classes)


def label_batches(classes: list[int], count: int, size: int = BATCH) -> list[tuple[int, Tensor]]:
    """Number of the first image, and labels int64 [N], of every batch; over all images the classes take turns."""
    labels = torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
    return list(zip(range(0, count, size), labels.split(size), strict=True))
