""""""

import torch

from ddpm.diffusion.unet import Attention, ResBlock, UNet
from ddpm.params import TrainParams
from ddpm.training.muon import Muon


def learning_rate(p: TrainParams, step: int) -> float:
    """Linear warm-up, then a straight line down to zero after the last step."""
    if step < p.warmup_steps:
        return p.learning_rate * (step + 1) / p.warmup_steps
    return p.learning_rate * (p.steps - step) / max(p.steps - p.warmup_steps, 1)


def make_optimizers(p: TrainParams, model: UNet) -> list[torch.optim.Optimizer]:
    """AdamW for all parameters, or Muon for the weight matrices inside the blocks and AdamW for the rest."""
    inside = [w for m in model.modules() if isinstance(m, ResBlock | Attention) for w in m.parameters() if w.ndim > 1]
    matrices = set(inside) if p.optimizer == "muon" else set()
    rest = [w for w in model.parameters() if w not in matrices]
    adamw = torch.optim.AdamW(rest, lr=p.learning_rate, betas=(0.9, 0.99), weight_decay=p.weight_decay, fused=True)
    return [adamw, Muon(inside, p.learning_rate, weight_decay=p.weight_decay)] if matrices else [adamw]


def set_learning_rate(optimizers: list[torch.optim.Optimizer], value: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = value


def ema_decay(p: TrainParams, step: int) -> float:
    """The decay at `step`: young averages forget faster, so that the random start doesn't linger."""
    return min(p.ema_decay, (1 + step) / (10 + step))
