"""Losses and gradient norms of a few steps. They stay on the device until the window is complete, so that it needn't wait."""

import math
import time

import torch
from torch import Tensor

from ddpm.errors import UserError
from ddpm.params import TrainParams
from ddpm.runtime.distributed import Group
from ddpm.training.optim import learning_rate

WINDOW = 10  # steps


class Window:
    """Steps n·WINDOW … (n+1)·WINDOW - 1. Use: `begin`, `add` for each step until `is_complete`, `close`; then read."""

    def __init__(self, p: TrainParams, device: torch.device, group: Group):
        self.p, self.group = p, group
        self._losses, self._norms = torch.zeros(WINDOW, device=device), torch.zeros(WINDOW, device=device)
        self.began = time.monotonic()
        self.steps = range(0)
        self.losses: list[float] = []  # one per step, over all ranks
        self.grad_norms: list[float] = []
        self.images_per_second = 0.0

    def begin(self) -> None:
        """Start measuring the rate."""
        self.began = time.monotonic()

    def add(self, step: int, loss: Tensor, grad_norm: Tensor) -> None:
        self._losses[step % WINDOW], self._norms[step % WINDOW] = loss, grad_norm
        self.steps = range(step // WINDOW * WINDOW, step + 1)

    def is_complete(self, step: int) -> bool:
        """Whether `step` was the last one of the window, or of the training."""
        return (step + 1) % WINDOW == 0 or step + 1 == self.p.steps

    def close(self, stop: list[int]) -> bool:
        """Fetch the figures; returns whether a signal is in any rank's `stop`. Raises UserError if a figure isn't finite."""
        shared = self.group.all_reduce_mean(torch.cat([self._losses, self._losses.new_tensor([len(stop)])]))
        self.losses = shared[: len(self.steps)].tolist()
        self.grad_norms = self._norms[: len(self.steps)].tolist()
        for step, loss, norm in zip(self.steps, self.losses, self.grad_norms, strict=True):
            if not math.isfinite(loss + norm):
                raise UserError(
                    f"training stopped at step {step}: the loss or its gradient is not finite (learning rate "
                    f"{learning_rate(self.p, step):.2g}); lower train.learning_rate or raise train.warmup_steps"
                )
        self.images_per_second = len(self.steps) * self.p.batch_size / (time.monotonic() - self.began)
        return shared[-1].item() > 0

    def row(self) -> dict[str, float]:
        """The window in the training curve: means over its steps, and the learning rate of the last."""
        return {
            "step": self.steps.stop,
            "loss": sum(self.losses) / len(self.losses),
            "learning_rate": learning_rate(self.p, self.steps.stop - 1),
            "grad_norm": sum(self.grad_norms) / len(self.grad_norms),
        }

    def reaches(self, every: int) -> bool:
        """Whether a multiple of `every` lies in the window, or the training's end."""
        return self.steps.stop // every > self.steps.start // every or self.steps.stop == self.p.steps
