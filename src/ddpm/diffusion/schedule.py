"""Noise schedules: how much of the image remains at each of T timesteps.

A schedule is the tensor `alphas_cumprod` ᾱ, float64 [T]. At timestep t an image x0 has become x_t = alpha_t x0 + sigma_t eps with
alpha_t = √ᾱ_t and sigma_t = √(1 - ᾱ_t).
"""

import math

import torch
from torch import Tensor

NEAR_ZERO_ALPHA = 0.05  # if √ᾱ_T is larger, what should be pure noise shows a visible trace of the image


def betas(schedule: str, timesteps: int) -> Tensor:
    """The variance β of the noise that each timestep adds, float64 [T]. Raises ValueError if there is no such schedule.

    linear: from 1e-4 to 0.02 for any T; Ho et al. 2020, sec. 4, chose these values for T = 1000.
    cosine: Nichol and Dhariwal 2021, eq. 17, at most 0.999.
    sigmoid: the same range as linear, along a logistic curve (Xu et al. 2022, GeoDiff).
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
    """A warning if the schedule doesn't end in pure noise, which spoils samples (Lin et al. 2024), else None."""
    alpha = alphas_cumprod(schedule, timesteps)[-1].sqrt().item()
    if alpha <= NEAR_ZERO_ALPHA:
        return None
    return (
        f"the {schedule} schedule with {timesteps} timesteps leaves √ᾱ_T = {alpha:.2f} of the image at the last timestep, but "
        "sampling starts from pure noise. Samples will look washed out, all of medium brightness. "
        "Use the cosine schedule, or more timesteps."
    )
