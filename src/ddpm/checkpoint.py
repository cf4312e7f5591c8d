"""The trained model as one file: the weights, and everything that sampling needs to know about them."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ddpm.data.fashion_mnist import CLASSES
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.unet import UNet
from ddpm.errors import UserError
from ddpm.files import write_atomic
from ddpm.paths import MODEL, PRETRAINED
from ddpm.tensor_files import load_tensors, serialise


@dataclass(frozen=True)
class Checkpoint:
    """A model that is ready to sample from."""

    model: UNet  # in evaluation mode
    diffusion: Diffusion
    label_dropout: float  # share of training images shown without their class: 0 allows no guidance, 1 no classes
    classes: list[str]  # names
    guide: UNet | None  # a worse version of the model, which guidance leads away from; models of earlier versions have none


def save_checkpoint(
    path: Path,
    weights: dict[str, Tensor],
    unet: dict,
    diffusion: dict,
    label_dropout: float,
    classes: Sequence[str] = CLASSES,
    guide: dict[str, Tensor] | None = None,
) -> None:
    """Write a checkpoint; `unet` and `diffusion` are the keyword arguments of UNet and Diffusion, `guide` the guide's weights."""

    def plain(some: dict[str, Tensor]) -> dict[str, Tensor]:
        # With the same objects as keys: pickle would write equal ones twice, and a resumed run has others than one in one go.
        return {name: some[name].detach().cpu().clone(memory_format=torch.contiguous_format) for name in weights}

    content = {
        "weights": plain(weights),
        "unet": unet,
        "diffusion": diffusion,
        "label_dropout": label_dropout,
        "classes": list(classes),
        **({"guide": plain(guide)} if guide else {}),
    }
    write_atomic(path, serialise(content))


def load_checkpoint(path: Path, device: torch.device) -> Checkpoint:
    """Read a checkpoint onto `device`.

    Raises UserError if the file is missing, corrupt, not a checkpoint, or its weights don't fit the network that it describes.
    """
    if path == PRETRAINED:
        remedy = f"`git checkout {PRETRAINED}` restores it"
    else:
        remedy = "`dvc repro train` makes it" if path == MODEL else f"`dvc repro train` makes {MODEL}"
    content = load_tensors(path, {"weights", "unet", "diffusion", "label_dropout"}, remedy)
    try:
        diffusion = Diffusion(**content["diffusion"]).to(device)
        model = frozen(content["unet"], content["weights"], device)
        guide = frozen(content["unet"], content["guide"], device) if "guide" in content else None
    except (TypeError, ValueError, RuntimeError, AttributeError, LookupError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: its weights don't fit the network that it describes ({reason}); {remedy}") from None
    return Checkpoint(model, diffusion, content["label_dropout"], content.get("classes", list(CLASSES)), guide)


def frozen(unet: dict, weights: dict[str, Tensor], device: torch.device) -> UNet:
    """A network in evaluation mode."""
    model = UNet(**unet)
    model.load_state_dict(weights)
    return model.to(device).to(memory_format=torch.channels_last).eval().requires_grad_(False)
