"""Where things are: the repository, and every file that stages and commands exchange, relative to its root."""

import os
from pathlib import Path

SOURCE = Path(__file__).resolve().parents[1]  # src/
LIBRARY = SOURCE / "ddpm"
TRACKING = LIBRARY / "tracking"

PARAMS = Path("params.yaml")
PRESETS = Path("presets")
PIPELINE = Path("dvc.yaml")
LOCK = Path("dvc.lock")

MODEL = Path("models/diffusion_model.pth")
CLASSIFIER = Path("models/classifier.pth")  # Fashion-MNIST's evaluator, committed: a retrained one would measure differently
PRETRAINED_FOLDER = Path("models/pretrained")  # the trained model that comes with the repository
PRETRAINED = PRETRAINED_FOLDER / "fashion_ddpm.pth"
PRETRAINED_CARD = PRETRAINED_FOLDER / "card.json"
PRETRAINED_SAMPLES = PRETRAINED_FOLDER / "samples.npz"  # not in git: the samples that the card's metrics judge

OUTPUT = Path("output")
SAMPLES = OUTPUT / "samples.npz"
GRID = OUTPUT / "generated_samples.png"
STRIP = OUTPUT / "denoising.png"
ANIMATION = OUTPUT / "denoising.gif"
NEIGHBOURS = OUTPUT / "nearest_neighbours.png"
PLOTS = OUTPUT / "plots"
TRAIN_METRICS = OUTPUT / "metrics/train.json"
EVALUATION_METRICS = OUTPUT / "metrics/evaluate.json"


def raw_folder(name: str) -> Path:
    """The folder of a data set, where torchvision looks too: `torchvision.datasets.FashionMNIST("data")`."""
    return Path("data") / name / "raw"


RAW = raw_folder("FashionMNIST")


def project_root() -> Path:
    """The root of the main repository, where stores, caches and training states are kept.

    In the temporary workspace of `dvc exp run --temp` or `--queue` this is not the working directory, which is deleted with
    everything in it when the experiment ends. There DVC names the main repository in DVC_ROOT.
    """
    root = os.environ.get("DVC_ROOT")
    if root and (Path(root) / ".dvc").is_dir():
        return Path(root).resolve()
    return SOURCE.parent
