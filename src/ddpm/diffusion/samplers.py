"""Samplers: pure functions that turn noise into images with any denoiser.

A denoiser maps x_t [N, C, H, W] and t to its estimate x̂0 of the clean images. Each sampler goes through the given timesteps, from
the largest to the smallest, and yields (x, x̂0) after every network evaluation; the last x is the samples.
"""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from ddpm.diffusion.process import Diffusion

Denoiser = Callable[[Tensor, int], Tensor]


def spaced_timesteps(timesteps: int, steps: int, spacing: str) -> list[int]:
    """`steps` of the timesteps 0 … T-1, largest first. Raises ValueError if there is no such spacing.

    trailing starts at T-1, where there is only noise; leading ends at 0; linspace does both (Lin et al. 2024, table 2), given at
    least two steps. tapered is like trailing, but its last interval is half as long as the others, because every solver's last
    step is of first order.
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


def is_guided(diffusion: Diffusion, t: int, guidance_scale: float, guidance_interval: Sequence[float] | None) -> bool:
    """Whether a guided denoiser makes a second prediction at timestep t."""
    lowest, highest = guidance_interval or (0, math.inf)
    return guidance_scale != 1 and lowest <= diffusion.noise_level(t) <= highest


def guided_denoiser(
    model: Callable,
    diffusion: Diffusion,
    labels: Tensor,
    null_class: int,
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] | None = None,
    clip: bool = True,
    guide: Callable | None = None,
) -> Denoiser:
    """The network as a denoiser for images of classes `labels` int64 [N].

    A guidance scale w other than 1 leads away from a worse prediction u: u + w (c - u), where c is the network's own. The worse
    one is made without the class (Ho and Salimans 2022), and by the `guide`, if there is one: the same network earlier in its
    training, which makes the same mistakes more often (Karras et al. 2024, sec. 3). With an interval, [lowest, highest], this is
    done only at noise levels sigma / alpha within it: at high ones guidance costs variety, at low ones it hardly helps
    (Kynkäänniemi et al. 2024, sec. 3). `clip` limits x̂0 to the range of pixels, [-1, 1].
    """

    def denoise(x: Tensor, t: int) -> Tensor:
        times = torch.full((len(x),), t, device=x.device)
        if not is_guided(diffusion, t, guidance_scale, guidance_interval):
            output = model(x, times, labels)
        else:
            no_labels = torch.full_like(labels, null_class)
            if guide is not None:
                own, worse = model(x, times, labels), guide(x, times, no_labels)
            else:  # in one batch of twice the size
                own, worse = model(torch.cat([x, x]), torch.cat([times, times]), torch.cat([labels, no_labels])).chunk(2)
            output = worse + guidance_scale * (own - worse)
        x0 = diffusion.to_x0(output.float(), x, times)
        return x0.clamp(-1, 1) if clip else x0

    return denoise


def _alpha_bars(alphas_cumprod: Tensor, timesteps: Sequence[int]) -> list[tuple[int, float, float]]:
    """For every step: t, ᾱ at t, and ᾱ at the next timestep, which is 1 after the last step because no noise is left."""
    alpha_bars = [alphas_cumprod[t].item() for t in timesteps] + [1.0]
    return list(zip(timesteps, alpha_bars[:-1], alpha_bars[1:], strict=True))


def ddpm(
    denoise: Denoiser, noise: Callable[[], Tensor], alphas_cumprod: Tensor, timesteps: Sequence[int], variance: str = "small"
) -> Iterator[tuple[Tensor, Tensor]]:
    """Ancestral sampling (Ho et al. 2020, alg. 2; eq. 6 and 7 for the posterior), over all or some timesteps.

    `variance`: "small" is β̃ of the posterior, optimal for a single fixed image; "large" is β, optimal for Gaussian images.
    """
    x = noise()
    for t, alpha_bar, next_alpha_bar in _alpha_bars(alphas_cumprod, timesteps):
        x0 = denoise(x, t)
        beta = 1 - alpha_bar / next_alpha_bar
        mean = (next_alpha_bar**0.5 * beta * x0 + (1 - beta) ** 0.5 * (1 - next_alpha_bar) * x) / (1 - alpha_bar)
        if next_alpha_bar < 1:
            scale = (1 - next_alpha_bar) / (1 - alpha_bar) if variance == "small" else 1.0
            x = mean + (scale * beta) ** 0.5 * noise()
        else:
            x = mean
        yield x, x0


def ddim(
    denoise: Denoiser, noise: Callable[[], Tensor], alphas_cumprod: Tensor, timesteps: Sequence[int], eta: float = 0.0
) -> Iterator[tuple[Tensor, Tensor]]:
    """DDIM (Song et al. 2021, eq. 12 and 16): deterministic if eta is 0, with the noise of ancestral sampling if it is 1."""
    x = noise()
    for t, alpha_bar, next_alpha_bar in _alpha_bars(alphas_cumprod, timesteps):
        x0 = denoise(x, t)
        eps = (x - alpha_bar**0.5 * x0) / (1 - alpha_bar) ** 0.5
        sigma = eta * ((1 - next_alpha_bar) / (1 - alpha_bar) * (1 - alpha_bar / next_alpha_bar)) ** 0.5
        x = next_alpha_bar**0.5 * x0 + max(1 - next_alpha_bar - sigma**2, 0) ** 0.5 * eps
        if sigma > 0:
            x = x + sigma * noise()
        yield x, x0


def dpmpp_2m(
    denoise: Denoiser, noise: Callable[[], Tensor], alphas_cumprod: Tensor, timesteps: Sequence[int]
) -> Iterator[tuple[Tensor, Tensor]]:
    """DPM-Solver++(2M), a second-order multistep solver of the probability-flow ODE (Lu et al. 2022, alg. 2).

    First order in the first step, which has no previous one, and in the last, at whose end λ = log(alpha / sigma) is infinite.
    """
    x, previous = noise(), None
    for t, alpha_bar, next_alpha_bar in _alpha_bars(alphas_cumprod, timesteps):
        x0 = denoise(x, t)
        if next_alpha_bar == 1:
            x = x0
        else:
            alpha, sigma = next_alpha_bar**0.5, (1 - next_alpha_bar) ** 0.5
            lam, next_lam = _half_log_snr(alpha_bar), _half_log_snr(next_alpha_bar)
            h = next_lam - lam
            d = x0
            if previous is not None:
                previous_x0, previous_h = previous
                d = x0 + (x0 - previous_x0) * h / (2 * previous_h)
            x = sigma / (1 - alpha_bar) ** 0.5 * x - alpha * math.expm1(-h) * d
            previous = (x0, h)
        yield x, x0


def _half_log_snr(alpha_bar: float) -> float:
    """λ = log(alpha / sigma)."""
    return 0.5 * math.log(alpha_bar / (1 - alpha_bar))


@torch.inference_mode()
def iter_samples(
    model: Callable,
    diffusion: Diffusion,
    labels: Tensor,
    null_class: int,
    noise: Callable[[], Tensor],
    sampler: str = "ddim",
    steps: int = 20,
    spacing: str = "trailing",
    eta: float = 0.0,
    variance: str = "small",
    clip: bool = True,
    guidance_scale: float = 1.0,
    guidance_interval: Sequence[float] | None = None,
    guide: Callable | None = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """(x, x̂0) after every network evaluation of the named sampler, for images of classes `labels` int64 [N].

    `noise()` gives Gaussian noise [N, C, H, W]: first x_T, then what the sampler adds.
    """
    denoise = guided_denoiser(model, diffusion, labels, null_class, guidance_scale, guidance_interval, clip, guide)
    timesteps = spaced_timesteps(diffusion.timesteps, steps, spacing)
    if sampler == "ddpm":
        yield from ddpm(denoise, noise, diffusion.alphas_cumprod, timesteps, variance)
    elif sampler == "ddim":
        yield from ddim(denoise, noise, diffusion.alphas_cumprod, timesteps, eta)
    elif sampler == "dpmpp_2m":
        yield from dpmpp_2m(denoise, noise, diffusion.alphas_cumprod, timesteps)
    else:
        raise ValueError(f"unknown sampler {sampler!r}")
