"""The validation loss and the sample previews of a training, both from fixed noise."""

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
VALIDATION_SEED = 0  # the same noise in every run, whatever its seed, so that runs compare
PIXELS_AT_ONCE = 250 * 64**2  # of test images in the network
QUARTERS = 4  # of the timesteps, for the validation loss
PREVIEW_ROWS, PREVIEW_COLUMNS, PREVIEW_STEPS = 4, 10, 20


@torch.inference_mode()
def validate(p: TrainParams, model: UNet, diffusion: Diffusion, data: Dataset) -> dict[str, float]:
    """`loss` on the first test images with fixed noise and timesteps, and `loss_quarter1` … 4 by quarter of the timesteps."""
    device, n = next(model.parameters()).device, min(VALIDATION_IMAGES, len(data.test_images))
    g = seeded_rng(VALIDATION_SEED, "validation", 0)
    eps = torch.randn(n, *data.image_shape, generator=g)
    t = torch.arange(n) * diffusion.timesteps // n
    t = t[torch.randperm(n, generator=g)]  # so that an image's timestep doesn't depend on its place in the test set
    unlabelled = p.label_dropout == 1
    losses = []
    for rows in torch.arange(n).split(max(1, min(250, PIXELS_AT_ONCE // data.image_shape[1] ** 2))):
        x0, times = to_model_range(data.test_images[rows].to(device)), t[rows].to(device)
        labels = data.test_labels[rows].to(device)
        labels = torch.full_like(labels, model.null_class) if unlabelled else labels
        noise = eps[rows].to(device)
        losses.append(diffusion.weighted_loss(model(diffusion.q_sample(x0, times, noise), times, labels), x0, times, noise).cpu())
    all_losses, quarter = torch.cat(losses), t * QUARTERS // diffusion.timesteps
    by_quarter = {f"loss_quarter{b + 1}": all_losses[quarter == b].mean().item() for b in range(QUARTERS)}
    return {"loss": all_losses.mean().item(), **by_quarter}


def preview(p: TrainParams, model: UNet, diffusion: Diffusion) -> Tensor:
    """A few samples of each class, uint8 [PREVIEW_ROWS * columns, …]. Column c is class c; there are at most PREVIEW_COLUMNS."""
    device = next(model.parameters()).device
    labels = torch.arange(min(model.null_class, PREVIEW_COLUMNS) or PREVIEW_COLUMNS, device=device).repeat(PREVIEW_ROWS)
    if p.label_dropout == 1 or model.null_class == 0:
        labels = torch.full_like(labels, model.null_class)
    noise = ImageNoise(VALIDATION_SEED, 0, len(labels), model.image_shape, device)
    steps = min(PREVIEW_STEPS, diffusion.timesteps)
    *_, (x, _) = iter_samples(model, diffusion, labels, model.null_class, noise, "ddim", steps)
    return to_uint8(x).cpu()
