""""""

from typing import Protocol

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.data.pixels import to_model_range, to_uint8
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import ImageNoise, seeded_rng
from ddpm.diffusion.samplers import iter_samples
from ddpm.diffusion.unet import UNet
from ddpm.params import TrainParams

VALIDATION_IMAGES = 1000
VALIDATION_SEED = 0  # the same noise for every run, so that runs with other seeds compare
BUCKETS = 4  # quarters of the timesteps, for the validation loss
PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_STEPS = 4, 10, 20


class Log(Protocol):
    """Where the loop reports to; it changes nothing that the loop computes."""

    def metrics(self, step: int, values: dict[str, float]) -> None: ...

    def preview(self, step: int, images: Tensor) -> None: ...

    def sync(self) -> None:
        """Return when a power cut can't undo what was reported."""
        ...


def report(
    p: TrainParams, done: int, ema: UNet, diffusion: Diffusion, data: Dataset, validation_curve: list[dict[str, float]], log: Log
) -> None:
    """The validation loss and a small grid of samples, both from the EMA weights, after `done` steps."""
    row = {"step": done, **validate(p, ema, diffusion, data)}
    validation_curve.append(row)
    log.metrics(done, {f"val/{name}": value for name, value in row.items() if name != "step"})
    log.preview(done, preview(p, ema, diffusion))


@torch.inference_mode()
def validate(p: TrainParams, model: UNet, diffusion: Diffusion, data: Dataset) -> dict[str, float]:
    """The loss on the first test images with fixed noise and timesteps, all of it and by quarter of the timesteps."""
    device, n = next(model.parameters()).device, min(VALIDATION_IMAGES, len(data.test_images))
    g = seeded_rng(VALIDATION_SEED, "validation", 0)
    eps = torch.randn(n, *data.image_shape, generator=g)
    t = torch.arange(n) * diffusion.timesteps // n
    t = t[torch.randperm(n, generator=g)]  # or the sorted timesteps would meet the images in the test set's order
    unlabelled = p.label_dropout == 1
    losses = []
    for rows in torch.arange(n).split(250):
        x0, times = to_model_range(data.test_images[rows].to(device)), t[rows].to(device)
        labels = data.test_labels[rows].to(device)
        labels = torch.full_like(labels, model.null_class) if unlabelled else labels
        noise = eps[rows].to(device)
        losses.append(diffusion.weighted_loss(model(diffusion.q_sample(x0, times, noise), times, labels), x0, times, noise).cpu())
    losses, bucket = torch.cat(losses), t * BUCKETS // diffusion.timesteps
    by_bucket = {f"loss_quarter{b + 1}": losses[bucket == b].mean().item() for b in range(BUCKETS)}
    return {"loss": losses.mean().item(), **by_bucket}


def preview(p: TrainParams, model: UNet, diffusion: Diffusion) -> Tensor:
    """A few samples of every class, uint8 [PREVIEW_ROWS * columns, …], at most PREVIEW_COLUMNS: column c is class c."""
    device = next(model.parameters()).device
    labels = torch.arange(min(model.null_class, PREVIEW_COLUMNS) or PREVIEW_COLUMNS, device=device).repeat(PREVIEW_ROWS)
    if p.label_dropout == 1 or model.null_class == 0:
        labels = torch.full_like(labels, model.null_class)
    noise = ImageNoise(VALIDATION_SEED, 0, len(labels), model.image_shape, device)
    steps = min(PREVIEW_STEPS, diffusion.timesteps)
    *_, (x, _) = iter_samples(model, diffusion, labels, model.null_class, noise, "ddim", steps)
    return to_uint8(x).cpu()
