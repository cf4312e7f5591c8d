"""The evaluator of a data set: which classifier's features are compared, and whether they can be trusted.

Fashion-MNIST has a frozen one in git. For any other data set one is trained when the first samples are evaluated.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from filelock import FileLock

from ddpm.data.dataset import Dataset
from ddpm.errors import UserError
from ddpm.evaluation.classifier import FEATURES, MADE_BY, TURNS, Classifier, load_classifier
from ddpm.evaluation.classifier_training import OWN_RECIPE, make_classifier, write_classifier
from ddpm.files import file_sha256, sha256, writing
from ddpm.params import FASHION_MNIST
from ddpm.paths import CLASSIFIER

LEAST_SKILL = 0.25  # 0: as good as guessing, 1: always right


@dataclass(frozen=True)
class Evaluator:
    classifier: Classifier
    path: Path
    sha256: str  # of the file
    accuracy: float  # share of the test images that it recognises; of the quarter turns, if there are no classes


def find_evaluator(setting: str, name: str, data: Dataset, data_sha256: str, cache: Path, device: torch.device) -> Evaluator:
    """The evaluator of the data set `name`, for the `setting` evaluate.classifier: "auto" or a file.

    "auto" is Fashion-MNIST's committed one, and otherwise one that is trained here, once, and kept in the folder `cache` under a
    hash of data, recipe and code. Raises UserError if the file isn't an evaluator of this data set.
    """
    if setting != "auto":
        path = Path(setting)
    else:
        path = CLASSIFIER if name == FASHION_MNIST else _trained(name, data, data_sha256, cache, device)
    network = load_classifier(path, name)
    if (network.channels, network.classes) != (data.image_shape[0], len(data.classes) or TURNS):
        raise UserError(
            f"{path}: trained on an earlier {name} with other classes or colours; set evaluate.classifier to auto, "
            f"or train it again: `{MADE_BY} --out {path}`"
        )
    accuracy = json.loads(path.with_suffix(".json").read_text())["test_accuracy"]
    return Evaluator(network, path, file_sha256(path), accuracy)


def _trained(name: str, data: Dataset, data_sha256: str, cache: Path, device: torch.device) -> Path:
    """The file of the evaluator that is trained here, by whichever process comes first."""
    code = [sha256(Path(__file__).with_name(f"{module}.py").read_bytes()) for module in ("classifier", "classifier_training")]
    key = sha256(json.dumps([name, data_sha256, OWN_RECIPE, *code]).encode())
    path = cache / f"classifier-{key[:16]}.pth"
    lock = FileLock(path.with_suffix(".lock"))
    with writing(path):
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    try:
        if not path.with_suffix(".json").exists():
            print(f"{name} has no evaluator yet: one is trained, once, and kept in {cache}", file=sys.stderr)
            write_classifier(path, *make_classifier(data, name, device))
    finally:
        lock.release()
    return path


def doubts(accuracy: float, data: Dataset) -> str | None:
    """Why the figures of an evaluator of this accuracy say little; None if they can be trusted."""
    if data.classes:
        chance = data.test_labels.bincount().max().item() / len(data.test_labels)  # always guessing the most frequent class
        recognised = "test images"
    else:
        chance, recognised = 1 / TURNS, "turns of test images"
    if accuracy - chance < LEAST_SKILL * (1 - chance):
        recognised = f"{accuracy:.0%} of the {recognised}, where guessing gives {chance:.0%}"
        return f"don't trust these figures: the evaluator recognises {recognised}"
    if len(data.test_images) < FEATURES:
        return f"there are only {len(data.test_images)} test images; with others the figures would be different, most of all fid"
    return None
