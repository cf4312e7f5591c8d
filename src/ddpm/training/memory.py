"""How much memory a training takes, estimated before it begins."""

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset
from ddpm.diffusion.unet import UNet
from ddpm.params import TrainParams
from ddpm.training.state import architecture

BACKWARD = 1.4  # what a step takes, in terms of what the forward pass keeps: gradients and work space, as measured on CPUs
COPIES = 6  # of the weights: themselves, gradients, their moving average, the guide, and the optimiser's two moments


def memory_needed(p: TrainParams, data: Dataset, images: int, bytes_per_number: int) -> int:
    """About how many bytes training takes with `images` in the network at once. The data set itself is not included."""
    with torch.device("meta"):  # shapes without numbers, so this takes neither time nor memory
        model = UNet(**architecture(p, data))
    weights = sum(w.numel() for w in model.parameters())
    kept_of_one = _kept(model, 2) - _kept(model, 1)
    return int(BACKWARD * images * kept_of_one * bytes_per_number) + COPIES * 4 * weights


def _kept(model: UNet, images: int) -> int:
    """How many numbers the network keeps of a batch for the backward pass."""
    kept: dict[int, int] = {}

    def count(x: Tensor) -> Tensor:
        kept[x.untyped_storage()._cdata] = x.numel()  # a tensor that two operations keep counts once
        held.append(x)
        return x

    held: list[Tensor] = []  # so that no storage takes the place of an earlier one
    x = torch.empty(images, *model.image_shape, device="meta")
    numbers = torch.zeros(images, dtype=torch.int64, device="meta")
    with torch.autograd.graph.saved_tensors_hooks(count, lambda x: x):
        model(x, numbers, numbers)
    return sum(kept.values())
