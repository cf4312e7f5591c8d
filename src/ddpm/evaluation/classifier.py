"""The network of the evaluator: a small classifier of the data set whose penultimate features the metrics compare.

Distances between feature distributions mean something only under the same features, so the weights are frozen and, for
Fashion-MNIST, committed (`models/classifier.pth`), with their SHA-256 and recipe beside them (`models/classifier.json`).
"""

import json
from pathlib import Path

import torch.nn.functional as F
from torch import Tensor, nn

from ddpm.data.pixels import channels_first
from ddpm.errors import UserError
from ddpm.files import file_sha256
from ddpm.params import FASHION_MNIST
from ddpm.paths import CLASSIFIER
from ddpm.tensor_files import load_tensors

PIXEL_MEAN, PIXEL_STD = 0.2860, 0.3530  # of Fashion-MNIST's pixels in [0, 1]; for other data the first layer learns its own
FEATURES = 128
MOST_PIXELS = 64  # along a side; larger images are averaged down to so many before anything else
TURNS = 4  # classes of a network that learned to recognise quarter turns, for data without classes
MADE_BY = "python src/train_classifier.py"


class Classifier(nn.Module):
    """A residual CNN, 0.54 M parameters. uint8 images [N, H, W] or [N, H, W, 3] → features [N, 128] and logits [N, classes]."""

    def __init__(self, classes: int = 10, channels: int = 1, dropout: float = 0.3):
        super().__init__()
        self.classes, self.channels = classes, channels

        def conv(channels_in: int, channels_out: int, stride: int = 1) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False), nn.BatchNorm2d(channels_out)
            )

        self.stem = conv(channels, 32)  # 28×28
        self.widen = conv(32, 64)  # 14×14
        self.shortcut = nn.Conv2d(64, FEATURES, 1, bias=False)
        self.block = nn.Sequential(conv(64, FEATURES), nn.ReLU(), conv(FEATURES, FEATURES))  # 7×7
        self.down = conv(FEATURES, FEATURES, stride=2)  # 4×4
        self.last = conv(FEATURES, FEATURES)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(FEATURES, classes)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = (channels_first(images).float() / 255 - PIXEL_MEAN) / PIXEL_STD
        x = averaged_down(x)
        x = F.max_pool2d(F.relu(self.stem(x)), 2)
        x = F.max_pool2d(F.relu(self.widen(x)), 2)
        x = F.relu(self.shortcut(x) + self.block(x))
        x = F.relu(self.down(x))
        x = F.relu(x + self.last(x))
        features = x.mean((2, 3))
        return features, self.head(self.dropout(features))


def averaged_down(x: Tensor) -> Tensor:
    """Images [N, C, H, H] as they are, or, if they are larger, averaged down to MOST_PIXELS along a side."""
    return F.interpolate(x, size=(MOST_PIXELS, MOST_PIXELS), mode="area") if x.shape[-1] > MOST_PIXELS else x


def load_classifier(path: Path, data: str = FASHION_MNIST) -> Classifier:
    """The frozen evaluator at `path`, in float32. Its bytes are checked against the card beside it, a .json file.

    Raises UserError if either file is missing, the hash differs, or it was trained on another data set than `data`.
    """
    card = path.with_suffix(".json")
    is_committed = path == CLASSIFIER
    remedy = f"`git checkout {path} {card}` restores" if is_committed else f"`{MADE_BY} --out {path}` makes"
    try:
        content = json.loads(card.read_text())
        expected, trained_on, _ = content["sha256"], content["data"], content["test_accuracy"]
    except FileNotFoundError:
        raise UserError(f"{card}: there is no such file; {remedy} it together with {path.name}") from None
    except (KeyError, TypeError, ValueError):
        raise UserError(f"{card}: lacks sha256, data or test_accuracy of {path.name}; {remedy} both") from None
    weights = load_tensors(path, {"weights"}, f"{remedy} it")["weights"]
    if file_sha256(path) != expected:
        raise UserError(f"{path}: not the classifier that {card.name} describes (SHA-256 differs); FIDs would not compare")
    if trained_on != data:
        raise UserError(f"{path}: trained on {trained_on}, not on {data}; set evaluate.classifier to auto")
    classifier = Classifier(len(weights["head.bias"]), weights["stem.0.weight"].shape[1])
    classifier.load_state_dict({name: w.float() if w.is_floating_point() else w for name, w in weights.items()})
    return classifier.eval().requires_grad_(False)
