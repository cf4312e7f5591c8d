"""Images from a trained model: what `src/sample.py` draws by the thousand, and a server on request."""

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from ddpm.checkpoint import load_model
from ddpm.data import CLASSES
from ddpm.params import SampleParams, UserError
from ddpm.samplers import ImageNoise, generate

BATCH = 125  # images denoised together; changes nothing beyond rounding
NULL_CLASS = len(CLASSES)


class Generator:
    """A trained model, ready to draw. Raises UserError where the file isn't one."""

    def __init__(self, checkpoint: Path, device: torch.device):
        self.checkpoint, self.device = checkpoint, device
        self.model, self.diffusion, self.label_dropout = load_model(checkpoint, device)

    def check(self, p: SampleParams) -> None:
        """Raise UserError where `p` asks of this model what it can't do."""
        timesteps, name = self.diffusion.timesteps, self.checkpoint
        if p.steps > timesteps:
            raise UserError(f"sample.steps: {p.steps}, but {name} has {timesteps} timesteps; use at most as many")
        if self.label_dropout == 1 and p.classes != "none":
            raise UserError(f"sample.classes: {name} was trained without classes; set it to none")
        if self.label_dropout == 0 and (p.classes == "none" or p.guidance_scale != 1):
            raise UserError(f"{name} never trained without classes: sample.guidance_scale must be 1, and classes not none")

    def walk(self, labels: Tensor, p: SampleParams, first: int = 0) -> Iterator[Tensor]:
        """Images `first`, `first + 1` … of `p.seed` for int64 labels [N]: [N, 1, 28, 28] in [-1, 1] after every step."""
        noise = ImageNoise(p.seed, first, len(labels), (1, 28, 28), self.device)
        guidance = 1.0 if p.classes == "none" else p.guidance_scale  # towards no class is nowhere
        for x, _ in generate(
            self.model, self.diffusion, labels.to(self.device), NULL_CLASS, noise,
            p.sampler, p.steps, p.spacing, p.eta, p.variance, p.clip, guidance,
        ):  # fmt: skip
            yield x


def class_ids(p: SampleParams) -> list[int]:
    """The classes that are asked for, NULL_CLASS for none."""
    return {"all": list(range(len(CLASSES))), "none": [NULL_CLASS]}.get(str(p.classes)) or list(p.classes)


def class_labels(classes: list[int], count: int) -> Tensor:
    """int64 [count]: the classes in turn."""
    return torch.tensor(classes).repeat(-(-count // len(classes)))[:count]
