"""The diffusion process in discrete time: adding noise to images, what the network predicts, the loss and its weights.

Ho et al. 2020 (forward process, prediction of eps), Salimans and Ho 2022 (prediction of v), Hang et al. 2023 (min-SNR weights).
"""

from typing import Self

import torch
from torch import Tensor

from ddpm.diffusion.schedule import alphas_cumprod


class Diffusion:
    """A noise schedule, and what the network predicts: "eps", "x0" or "v". Images are float [N, C, H, W], timesteps int64 [N]."""

    def __init__(self, timesteps: int, schedule: str, prediction: str, min_snr_gamma: float | None = None):
        self.timesteps, self.schedule = timesteps, schedule
        self.prediction, self.min_snr_gamma = prediction, min_snr_gamma
        self.alphas_cumprod = alphas_cumprod(schedule, timesteps)  # float64 [T]
        self.alpha = self.alphas_cumprod.sqrt().float()
        self.sigma = (1 - self.alphas_cumprod).sqrt().float()
        weight = self._loss_weight()
        self.weight, self.mean_weight = weight.float(), weight.mean().item()
        self.cumulative_weight = weight.cumsum(0) / weight.sum()

    def to(self, device: torch.device) -> Self:
        """Moves the tensors that training and sampling use to `device`; returns itself."""
        for name in ("alpha", "sigma", "weight"):
            setattr(self, name, getattr(self, name).to(device))
        return self

    def _loss_weight(self) -> Tensor:
        """Weights [T] of the squared error of the prediction: such that an error of x0 weighs min(SNR, γ); all 1 if γ is None."""
        snr = self.alphas_cumprod / (1 - self.alphas_cumprod)
        if self.min_snr_gamma is None:
            return torch.ones_like(snr)
        clipped = snr.clamp(max=self.min_snr_gamma)
        return {"eps": clipped / snr, "x0": clipped, "v": clipped / (snr + 1)}[self.prediction]

    def timesteps_at(self, quantiles: Tensor) -> Tensor:
        """Timesteps int64 [N] at the given quantiles, [N] in [0, 1), of the distribution proportional to the loss weights."""
        t = torch.searchsorted(self.cumulative_weight, quantiles.double(), right=True)
        return t.clamp(max=self.timesteps - 1)

    def noise_level(self, t: int) -> float:
        """sigma / alpha at timestep t: close to 0 at t = 0; at t = 999, 160 (linear schedule) or 20 000 (cosine)."""
        alpha_bar = self.alphas_cumprod[t].item()
        return ((1 - alpha_bar) / alpha_bar) ** 0.5

    def _at(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """alpha_t and sigma_t, [N, 1, 1, 1]."""
        return self.alpha[t].view(-1, 1, 1, 1), self.sigma[t].view(-1, 1, 1, 1)

    def q_sample(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """x_t = alpha_t x0 + sigma_t eps (Ho et al. 2020, eq. 4)."""
        alpha, sigma = self._at(t)
        return alpha * x0 + sigma * eps

    def target(self, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """What the network should predict at x_t; v = alpha_t eps - sigma_t x0 (Salimans and Ho 2022, app. D)."""
        if self.prediction == "eps":
            return eps
        if self.prediction == "x0":
            return x0
        alpha, sigma = self._at(t)
        return alpha * eps - sigma * x0

    def to_x0(self, output: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """The clean image that follows from the network's `output` at x_t."""
        if self.prediction == "x0":
            return output
        alpha, sigma = self._at(t)
        if self.prediction == "eps":
            return (x_t - sigma * output) / alpha
        return alpha * x_t - sigma * output

    def squared_error(self, output: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The mean squared error of the prediction for each image, [N]."""
        return (output.float() - self.target(x0, t, eps)).square().mean((1, 2, 3))

    def weighted_loss(self, output: Tensor, x0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """The mean squared error for each image, times the weight of its timestep, [N]."""
        return self.squared_error(output, x0, t, eps) * self.weight[t]
