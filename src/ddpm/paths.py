"""Where files are: the repository's root, and every file that stages and commands exchange, relative to it."""

import os
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]  # src/
LIBRARY = SOURCE / "ddpm"
TRACKING = LIBRARY / "tracking"

PARAMS = Path("params.yaml")
PRESETS = Path("presets")
PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")

CACHE = Path(".cache")  # in the main repository: verified downloads, features, locks
RESUME = Path(".resume")  # in the main repository: what unfinished runs resume from

MODEL = Path("models/diffusion_model.pth")
CLASSIFIER = Path("models/classifier.pth")  # evaluator for Fashion-MNIST, in git because a retrained one gives other metrics
PRETRAINED_FOLDER = Path("models/pretrained")  # the trained model that comes with the repository
PRETRAINED = PRETRAINED_FOLDER / "fashion_ddpm.pth"
PRETRAINED_CARD = PRETRAINED_FOLDER / "card.json"
PRETRAINED_SAMPLES = PRETRAINED_FOLDER / "samples.npz"  # the samples that the card's metrics are computed from; not in git

OUTPUT = Path("output")
SAMPLES = OUTPUT / "samples.npz"
GRID = OUTPUT / "generated_samples.png"
STRIP = OUTPUT / "denoising.png"
ANIMATION = OUTPUT / "denoising.gif"
NEIGHBOURS = OUTPUT / "nearest_neighbours.png"
PLOTS = OUTPUT / "plots"
TRAIN_METRICS = OUTPUT / "metrics/train.json"
EVALUATION_METRICS = OUTPUT / "metrics/evaluate.json"


def classifier_file(name: str) -> Path:
    """The evaluator of a data set other than Fashion-MNIST."""
    return Path(f"models/classifier-{name}.pth")


def raw_folder(name: str) -> Path:
    """The folder of a data set's files. torchvision looks there, too: `torchvision.datasets.FashionMNIST("data")`."""
    return Path("data") / name / "raw"


def project_root() -> Path:
    """The root of the main repository, where stores, caches and training states are kept.

    `dvc exp run --temp` and `--queue` run the stages in a temporary workspace, which is deleted with everything in it when the
    experiment ends. There DVC names the main repository in DVC_ROOT.
    """
    root = os.environ.get("DVC_ROOT")
    if root and (Path(root) / ".dvc").is_dir():
        return Path(root).resolve()
    return SOURCE.parent
