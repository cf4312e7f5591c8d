"""The trained model as one file."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ddpm.data.fashion_mnist import CLASSES
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.unet import UNet
from ddpm.errors import UserError
from ddpm.files import load_tensors, serialise, write_atomic
from ddpm.paths import MODEL, PRETRAINED

REMEDIES = {MODEL: "`dvc repro train` makes it", PRETRAINED: f"`git checkout {PRETRAINED}` makes it"}


def save_model(
    path: Path, weights: dict[str, Tensor], unet: dict, diffusion: dict, label_dropout: float, classes: Sequence[str] = CLASSES
) -> None:
    """Write all that sampling needs: weights, what the network looks like, what it predicts, and which classes it knows."""
    weights = {name: w.detach().cpu().clone(memory_format=torch.contiguous_format) for name, w in weights.items()}
    content = {"weights": weights, "unet": unet, "diffusion": diffusion, "label_dropout": label_dropout, "classes": list(classes)}
    write_atomic(path, serialise(content))


def load_model(path: Path, device: torch.device) -> tuple[UNet, Diffusion, float, list[str]]:
    """The network in evaluation mode, its diffusion, the share of labels dropped in training, and the classes' names.

    Raises UserError if the file is missing, damaged, not a model, or its weights don't fit the network that it describes.
    """
    remedy = REMEDIES.get(path, f"`dvc repro train` makes {MODEL}")
    content = load_tensors(path, {"weights", "unet", "diffusion", "label_dropout"}, remedy)
    try:
        model, diffusion = UNet(**content["unet"]), Diffusion(**content["diffusion"])
        model.load_state_dict(content["weights"])
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: its weights are not those of the network that it describes ({reason}); {remedy} anew") from None
    model = model.to(device, memory_format=torch.channels_last).eval().requires_grad_(False)
    return model, diffusion.to(device), content["label_dropout"], content.get("classes", list(CLASSES))
