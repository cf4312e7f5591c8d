"""Samplers: pure functions from noise to images over any denoiser.

A denoiser maps (x_t [N, C, H, W], t) to the clean image x̂0 that it sees in x_t. Each sampler walks down the given
timesteps and yields (x, x̂0) after every network evaluation; the last x is the sample.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import ImageNoise

Denoiser = Callable[[Tensor, int], Tensor]


def spaced_timesteps(timesteps: int, steps: int, spacing: str) -> list[int]:
    """`steps` of the timesteps 0 … T-1, largest first.

    trailing starts at T-1, where there is only noise; leading ends at 0; linspace has both (Lin et al. 2024, table 2), of two
    or more. tapered is trailing with a last interval half as long as the others: all solvers are of first order there.
    """
    if spacing == "linspace":
        times = torch.linspace(0, timesteps - 1, steps, dtype=torch.float64).round().long().flip(0)
    elif spacing == "leading":
        times = (torch.arange(steps) * (timesteps // steps)).flip(0)
    elif spacing == "trailing":
        times = torch.tensor([round(timesteps - i * timesteps / steps) - 1 for i in range(steps)])
    elif spacing == "tapered":
        times = torch.tensor([round((timesteps - 1) * (1 - 2 * i / (2 * steps - 1))) for i in range(steps)])
    else:
        raise ValueError(f"unknown spacing {spacing!r}")
    return times.tolist()


def guided_denoiser(
    model: Callable, diffusion: Diffusion, labels: Tensor, null_class: int, guidance_scale: float = 1.0, clip: bool = True
) -> Denoiser:
    """The network as a denoiser of images of the given classes [N].

    A guidance scale w other than 1 mixes the predictions with and without the class, u + w (c - u), in one batch of
    twice the size (Ho and Salimans 2022). `clip` keeps x̂0 in the range of pixels.
    """

    def denoise(x: Tensor, t: int) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if guidance_scale == 1:
            output = model(x, times, labels)
        else:
            both = torch.cat([labels, torch.full_like(labels, null_class)])
            conditional, unconditional = model(torch.cat([x, x]), torch.cat([times, times]), both).chunk(2)
            output = unconditional + guidance_scale * (conditional - unconditional)
        x0 = diffusion.to_x0(output.float(), x, times)
        return x0.clamp(-1, 1) if clip else x0

    return denoise


def _signal_levels(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """(t, ᾱ at t, ᾱ at the next timestep) for every step; after the last one there is no noise left, ᾱ = 1."""
    levels = [alphas_cumprod[t].item() for t in timesteps] + [1.0]
    return list(zip(timesteps, levels[:-1], levels[1:], strict=True))


def ddpm(
    denoise: Denoiser, noise: Callable[[], Tensor], alphas_cumprod: Tensor, timesteps: Sequence[int], variance: str = "small"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ancestral sampling (Ho et al. 2020, alg. 2; eq. 6 and 7 for the posterior), over all or some timesteps.

    `variance`: "small" is the posterior's β̃, right for one fixed image; "large" is β, right for Gaussian images.
    """
    x = noise()
    for t, level, next_level in _signal_levels(alphas_cumprod, timesteps):
        x0 = denoise(x, t)
        beta = 1 - level / next_level
        mean = (next_level**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - next_level) * x) / (1 - level)
        if next_level < 1:
            scale = (1 - next_level) / (1 - level) if variance == "small" else 1.0
            x = mean + (scale * beta) ** 0.5 * noise()
        else:
            x = mean
        yield x, x0


def ddim(
    denoise: Denoiser, noise: Callable[[], Tensor], alphas_cumprod: Tensor, timesteps: Sequence[int], eta: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic at eta = 0, as noisy as ancestral sampling at eta = 1."""
    x = noise()
    for t, level, next_level in _signal_levels(alphas_cumprod, timesteps):
        x0 = denoise(x, t)
        eps = (x - level**0.5 * x0) / (1 - level) ** 0.5
        sigma = eta * ((1 - next_level) / (1 - level) * (1 - level / next_level)) ** 0.5
        x = next_level**0.5 * x0 + max(1 - next_level - sigma**2, 0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise()
        yield x, x0


def dpmpp_2m(
    denoise: Denoiser, noise: Callable[[], Tensor], alphas_cumprod: Tensor, timesteps: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2M), a second-order multistep solver of the probability-flow ODE (Lu et al. 2022, alg. 2).

    First order at the first step, which has no past, and at the last, where λ = log(alpha / sigma) ends in infinity.
    """
    x, previous = noise(), None
    for t, level, next_level in _signal_levels(alphas_cumprod, timesteps):
        x0 = denoise(x, t)
        if next_level == 1:
            x = x0
        else:
            alpha, sigma = next_level**0.5, (1 - next_level) ** 0.5
            lam, next_lam = _half_log_snr(level), _half_log_snr(next_level)
            h = next_lam - lam
            d = x0
            if previous is not None:
                previous_x0, previous_h = previous
                d = x0 + (x0 - previous_x0) * h / (2 * previous_h)
            x = sigma / (1 - level) ** 0.5 * x - alpha * math.expm1(-h) * d
            previous = (x0, h)
        yield x, x0


def _half_log_snr(level: float) -> float:
    """λ = log(alpha / sigma)."""
    return 0.5 * math.log(level / (1 - level))


@torch.inference_mode()
def iter_samples(
    model: Callable,
    diffusion: Diffusion,
    labels: Tensor,
    null_class: int,
    noise: ImageNoise,
    sampler: str = "ddim",
    steps: int = 20,
    spacing: str = "trailing",
    eta: float = 0.0,
    variance: str = "small",
    clip: bool = True,
    guidance_scale: float = 1.0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Run the named sampler for images of classes `labels` [N]; yields as the samplers do."""
    denoise = guided_denoiser(model, diffusion, labels, null_class, guidance_scale, clip)
    timesteps = spaced_timesteps(diffusion.timesteps, steps, spacing)
    options = {"ddpm": {"variance": variance}, "ddim": {"eta": eta}, "dpmpp_2m": {}}[sampler]
    yield from {"ddpm": ddpm, "ddim": ddim, "dpmpp_2m": dpmpp_2m}[sampler](
        denoise, noise, diffusion.alphas_cumprod, timesteps, **options
    )
