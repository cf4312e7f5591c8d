""""""

import torch
from torch import Tensor, nn

from ddpm.data.dataset import Dataset
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import seeded_rng
from ddpm.errors import UserError
from ddpm.params import TrainParams

WORTH_FUSING = 1_700_000  # images: fewer, and fused kernels don't win back half a minute of compiling (default model, H200)


def compiled(network: nn.Module, graphs: bool, images: int, device: torch.device) -> nn.Module:
    """The network, compiled as pays for training on so many images.

    `graphs`: with CUDA graphs, which admit neither other processes' gradients nor those of another part of a batch.
    """
    if graphs and device.type == "cuda" and images < WORTH_FUSING:
        return torch.compile(network, backend="cudagraphs")  # PyTorch's own kernels, ready in seconds
    return torch.compile(network, mode="reduce-overhead" if graphs else "default")


def use_bfloat16(p: TrainParams, device: torch.device) -> bool:
    """`auto`: where the device computes in it; some older GPUs only imitate it, slowly."""
    supported = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return p.precision == "bfloat16" or (p.precision == "auto" and supported)


def architecture(p: TrainParams, data: Dataset) -> dict:
    """What makes the U-Net for this data set. Raises UserError where none can be made."""
    channels, size, _ = data.image_shape
    try:
        p.model.check(size)
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    return {**p.model.model_dump(), "classes": len(data.classes), "image_size": size, "image_channels": channels}


def draw(
    p: TrainParams, step: int, images: int, shape: tuple[int, int, int], diffusion: Diffusion
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What training step `step` draws, from (seed, step) alone, on the CPU.

    Indices int64 [B] of images, timesteps int64 [B], noise float [B, *shape], and which labels are dropped, bool [B].
    Two things make the loss less noisy and leave its mean: timesteps are drawn as often as the loss weights them, instead of
    evenly and then weighted (importance sampling), and stratified, one from each B-th of their distribution (Kingma et al.
    2021, app. I.1).
    """
    g = seeded_rng(p.seed, "train", step)
    batch = torch.randint(images, (p.batch_size,), generator=g)
    strata = (torch.arange(p.batch_size) + torch.rand(p.batch_size, generator=g)) / p.batch_size
    t = diffusion.timesteps_at(strata)
    eps = torch.randn(p.batch_size, *shape, generator=g)
    dropped = torch.rand(p.batch_size, generator=g) < p.label_dropout
    return batch, t, eps, dropped


def batch_loss(network: nn.Module, diffusion: Diffusion, x0: Tensor, labels: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """The loss of a step on images float [B, C, H, W] and classes int64 [B], with timesteps and noise as `draw` gives them."""
    x_t = diffusion.q_sample(x0, t, eps).contiguous(memory_format=torch.channels_last)
    output = network(x_t, t, labels)
    return diffusion.squared_error(output, x0, t, eps).mean() * diffusion.mean_weight
