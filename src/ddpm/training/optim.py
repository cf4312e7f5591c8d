"""Optimisers, the schedule of the learning rate, and the decay of the weights' moving average."""

import torch
from torch import Tensor

from ddpm.diffusion.unet import Attention, ResBlock, UNet
from ddpm.params import TrainParams
from ddpm.training.muon import Muon


class Optimizers:
    """The optimisers of a model, stepped and saved as one."""

    def __init__(self, p: TrainParams, model: UNet):
        self.p, self.parts = p, make_optimizers(p, model)

    def step(self) -> None:
        for optimizer in self.parts:
            optimizer.step()

    def set_learning_rate(self, step: int) -> None:
        for optimizer in self.parts:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(self.p, step)

    def state_dict(self) -> list[dict]:
        return [optimizer.state_dict() for optimizer in self.parts]

    def load_state_dict(self, content: list[dict]) -> None:
        for optimizer, part in zip(self.parts, content, strict=True):
            optimizer.load_state_dict(part)


def make_optimizers(p: TrainParams, model: UNet) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the weight matrices inside the blocks and AdamW for the rest."""
    blocks = [m for m in model.modules() if isinstance(m, ResBlock | Attention)]
    inside: list[Tensor] = [w for block in blocks for w in block.parameters() if w.ndim > 1]
    matrices = set(inside) if p.optimizer == "muon" else set()
    rest = [w for w in model.parameters() if w not in matrices]
    adamw = torch.optim.AdamW(rest, lr=p.learning_rate, betas=(0.9, 0.99), weight_decay=p.weight_decay, fused=True)
    return [adamw, Muon(inside, p.learning_rate, weight_decay=p.weight_decay)] if matrices else [adamw]


def learning_rate(p: TrainParams, step: int) -> float:
    """Linear warm-up to `p.learning_rate`, then a straight line that reaches zero after the last step."""
    if step < p.warmup_steps:
        return p.learning_rate * (step + 1) / p.warmup_steps
    return p.learning_rate * (p.steps - step) / max(p.steps - p.warmup_steps, 1)


def ema_decay(p: TrainParams, step: int) -> float:
    """The decay of the moving average at `step`: smaller in early steps, so that the random start is soon forgotten."""
    return min(p.ema_decay, (1 + step) / (10 + step))
