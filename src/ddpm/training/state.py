"""The training state: everything that a run needs to resume, and the files that keep it."""

import copy
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.diffusion.unet import UNet
from ddpm.errors import UserError
from ddpm.params import TrainParams
from ddpm.runtime.distributed import Group
from ddpm.tensor_files import read_verified, write_verified
from ddpm.training.optim import Optimizers

KEPT_STATES = 2  # the newest, and one to fall back to if the newest is corrupt


@dataclass
class TrainingState:
    """What changes from step to step. Each field is saved and loaded by its name; modules by their state_dict."""

    model: UNet
    ema: UNet  # moving average of the model's weights
    optimizers: Optimizers
    step: int = 0  # steps done
    guide: dict[str, Tensor] = field(default_factory=dict)  # the average after a fifth of the steps, on the CPU
    train_curve: list[dict[str, float]] = field(default_factory=list)
    validation_curve: list[dict[str, float]] = field(default_factory=list)

    @classmethod
    def initial(cls, p: TrainParams, data: Dataset, device: torch.device) -> Self:
        """The state before the first step: random weights that depend on `p.seed` alone."""
        torch.manual_seed(p.seed)
        model = UNet(**architecture(p, data)).to(device).to(memory_format=torch.channels_last)
        optimizers = Optimizers(p, model)
        return cls(model, copy.deepcopy(model).eval().requires_grad_(False), optimizers)

    def state_dict(self) -> dict:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in values.items()}

    def load_state_dict(self, content: dict) -> None:
        for name, value in content.items():
            if hasattr(part := getattr(self, name), "load_state_dict"):
                part.load_state_dict(value)
            else:
                setattr(self, name, value)

    def save(self, folder: Path) -> None:
        save_state(folder, self.step, self.state_dict())

    def resume(self, folder: Path, group: Group) -> None:
        """Load the newest state that rank 0 finds in `folder`, on every rank; without one nothing changes."""
        if content := group.broadcast(load_state(folder) if group.is_main else None):
            self.load_state_dict(content)


def architecture(p: TrainParams, data: Dataset) -> dict:
    """The U-Net's arguments for this data set. Raises UserError if no such U-Net fits its images."""
    channels, size, _ = data.image_shape
    try:
        p.model.check(size)
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    return {**p.model.model_dump(), "classes": len(data.classes), "image_size": size, "image_channels": channels}


def save_state(folder: Path, step: int, state: dict) -> None:
    """Write the state after `step` steps, and keep the one before it."""
    write_verified(folder / f"state-{step:08d}.pt", state)
    for old in sorted(folder.glob("state-*.pt"))[:-KEPT_STATES]:
        old.unlink()


def load_state(folder: Path) -> dict | None:
    """The newest intact state in `folder`, on the CPU; None if there is none."""
    for path in sorted(folder.glob("state-*.pt"), reverse=True):
        if state := read_verified(path):
            return state
        print(f"warning: {path} is corrupt; falling back to the state before it", file=sys.stderr)
        path.unlink(missing_ok=True)  # or it would be kept in the place of an intact one
    return None
