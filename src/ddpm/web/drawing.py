"""What the page draws: images with every step on the way, or a strip from one class or seed to another."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from ddpm.data.pixels import to_uint8
from ddpm.diffusion.rng import ImageNoise
from ddpm.diffusion.samplers import is_guided, spaced_timesteps
from ddpm.errors import UserError
from ddpm.params import SampleParams
from ddpm.sampling.pipeline import Pipeline, label_batches
from ddpm.serving.requests import Request, class_names, class_numbers, parameters

LARGEST = 64 << 20  # bytes of all the steps of a drawing


class Drawing(Request):
    """Images `0` … `count - 1` of a seed, or with `to_class` or `to_seed` a strip of `count` images between two of them.

    `checkpoint` is the beginning of the model file's SHA-256: with it, no other model draws.
    """

    count: int = Field(20, ge=1, le=100)
    steps: int | None = Field(None, ge=1, le=100)
    sampler: Literal["ddpm", "ddim", "dpmpp_2m"] | None = None
    to_class: str | None = None
    to_seed: int | None = Field(None, ge=0, lt=2**32)
    model: str | None = None
    checkpoint: str | None = Field(None, pattern="^[0-9a-f]{12}$")

    @property
    def is_strip(self) -> bool:
        return self.to_class is not None or self.to_seed is not None


@dataclass(frozen=True)
class Step:
    """The images after a step, and what it took to get there."""

    number: int  # 0 for the noise that sampling starts from
    noise_level: float  # sigma / alpha of x; 0 after the last step
    evaluations: int  # of the network so far, for each image
    x: Tensor  # uint8 [N, H, H] or [N, H, H, 3]
    x0: Tensor | None  # the estimate of the clean images that led to this step, likewise; none for the noise


class Plan:
    """A drawing that a model can make. Raises UserError if it can't."""

    def __init__(self, pipeline: Pipeline, sampling: SampleParams, drawing: Drawing):
        self.pipeline, self.drawing = pipeline, drawing
        self.p = parameters(pipeline, sampling, drawing)
        size = drawing.count * pipeline.image_shape[0] * pipeline.image_shape[1] ** 2 * 2 * (self.p.steps + 1)
        if self.p.steps > 100:  # by the model's parameters: the field has its own limit
            raise UserError(f"steps: {self.p.steps} in this model's parameters are too many for the page; ask for at most 100")
        if drawing.count > pipeline.batch_size or size > LARGEST:
            raise UserError(f"count: {drawing.count} images in {self.p.steps} steps are too many at once; ask for fewer")
        ids = pipeline.class_ids(self.p)
        if drawing.is_strip and len(ids) != 1:
            raise UserError("classes: a strip starts from one class; give exactly one")
        if drawing.is_strip and drawing.count == 1:
            raise UserError("count: a strip has at least two images")
        self.to_class = class_numbers([drawing.to_class], pipeline.classes)[0] if drawing.to_class is not None else None
        ((_, self.labels),) = label_batches(ids, drawing.count, drawing.count)
        self.names = class_names(pipeline, self.labels)

    def steps(self) -> Iterator[Step]:
        p, diffusion = self.p, self.pipeline.diffusion
        timesteps = spaced_timesteps(diffusion.timesteps, p.steps, p.spacing)
        levels = [*map(diffusion.noise_level, timesteps), 0.0]
        noise = self._noise()
        x_T, evaluations = noise(), 0
        yield Step(0, levels[0], 0, _pixels(x_T), None)
        draws = chain([x_T], iter(noise, None))
        for i, (x, x0) in enumerate(self.pipeline.iter_steps(self.labels, p, lambda: next(draws), self._network())):
            evaluations += 1 + is_guided(diffusion, timesteps[i], self.pipeline.guidance(p), p.guidance_interval)
            yield Step(i + 1, levels[i + 1], evaluations, _pixels(x), _pixels(x0))

    def _noise(self) -> Callable[[], Tensor]:
        """Noise [N, C, H, W] at every call: of each image; in a strip that of the first image, or what is between two seeds."""
        drawing, shape, device = self.drawing, self.pipeline.image_shape, self.pipeline.device
        if not drawing.is_strip:
            return ImageNoise(drawing.seed, 0, drawing.count, shape, device)
        first = ImageNoise(drawing.seed, 0, 1, shape, device)
        if drawing.to_seed is None or drawing.to_seed == drawing.seed:
            return lambda: first().expand(drawing.count, *shape)
        last = ImageNoise(drawing.to_seed, 0, 1, shape, device)
        return lambda: slerp(first(), last(), self._shares())

    def _network(self) -> Callable | None:
        """In a strip between two classes what takes the place of the network: a mixture of its predictions for both."""
        if self.to_class is None:
            return None
        model, null, shares = self.pipeline.model, self.pipeline.null_class, self._shares()
        number = self.to_class

        def mixture(x: Tensor, t: Tensor, y: Tensor) -> Tensor:
            other = torch.where(y == null, y, number)  # guidance may ask for both, with and without the class, in one batch
            return torch.lerp(model(x, t, y), model(x, t, other), shares.repeat(len(x) // len(shares), 1, 1, 1))

        return mixture

    def _shares(self) -> Tensor:
        """[N, 1, 1, 1], from 0 for the first image of a strip to 1 for the last."""
        return torch.linspace(0, 1, self.drawing.count, device=self.pipeline.device).view(-1, 1, 1, 1)


def slerp(a: Tensor, b: Tensor, share: Tensor) -> Tensor:
    """Spherical interpolation (Shoemake 1985) from noise `a` to noise `b`, [1, …], by shares [N, …]: as long as noise is."""
    cosine = (a * b).sum() / (a.norm() * b.norm())
    angle = torch.arccos(cosine.clamp(-1, 1))
    return (torch.sin((1 - share) * angle) * a + torch.sin(share * angle) * b) / torch.sin(angle)


def _pixels(x: Tensor) -> Tensor:
    return to_uint8(x).cpu()
