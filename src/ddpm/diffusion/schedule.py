"""Noise schedules: how much of the image is left at each of T timesteps.

A schedule is the tensor `alphas_cumprod` ᾱ, float64 [T]: at timestep t an image x0 has become
x_t = alpha_t x0 + sigma_t eps, with alpha_t = √ᾱ_t and sigma_t = √(1 - ᾱ_t).
"""

import math

import torch
from torch import Tensor

NEAR_ZERO_ALPHA = 0.05  # √ᾱ_T above this leaves a visible trace of the image in what should be pure noise


def betas(schedule: str, timesteps: int) -> Tensor:
    """The variances β, float64 [T], that each timestep adds.

    linear: 1e-4 … 0.02 whatever T is, as Ho et al. 2020, sec. 4, chose for T = 1000.
    cosine: Nichol and Dhariwal 2021, eq. 17, capped at 0.999.
    sigmoid: the linear range along a logistic curve, as Xu et al. 2022 (GeoDiff) have it.
    """
    if schedule == "linear":
        return torch.linspace(1e-4, 0.02, timesteps, dtype=torch.float64)
    if schedule == "cosine":
        t = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
        f = torch.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
        return (1 - f[1:] / f[:-1]).clamp(max=0.999)
    if schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, timesteps, dtype=torch.float64)) * (0.02 - 1e-4) + 1e-4
    raise ValueError(f"unknown schedule {schedule!r}")


def alphas_cumprod(schedule: str, timesteps: int) -> Tensor:
    """ᾱ_t = Π (1 - β_s) over s ≤ t, float64 [T]."""
    return torch.cumprod(1 - betas(schedule, timesteps), dim=0)


def terminal_warning(schedule: str, timesteps: int) -> str | None:
    """What a schedule that doesn't end in noise does to samples (Lin et al. 2024), or None for one that does."""
    alpha = alphas_cumprod(schedule, timesteps)[-1].sqrt().item()
    if alpha <= NEAR_ZERO_ALPHA:
        return None
    return (
        f"the {schedule} schedule with {timesteps} timesteps leaves √ᾱ_T = {alpha:.2f} of the image at the last one, but "
        "sampling starts from pure noise: samples come out washed out, all of middling brightness. "
        "Use the cosine schedule, or more timesteps."
    )
