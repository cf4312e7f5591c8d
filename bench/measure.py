"""What the parts of the bench share: the machine, rates, and files of results."""

import json
import os
import platform
import shutil
import statistics
import subprocess
import time
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from contenders import ROOT, SAMPLE_SEED, guard
from ddpm import paths
from ddpm.data.pixels import to_model_range
from ddpm.data.samples_file import read_samples
from ddpm.evaluation.classifier import Classifier, load_classifier
from ddpm.evaluation.features import extract, extract_cached
from ddpm.files import file_sha256
from ddpm.params import SampleParams
from ddpm.paths import CLASSIFIER
from ddpm.runtime.device import select_device
from ddpm.sampling.pipeline import Pipeline, label_batches
from ddpm.serving import pretrained

RESULTS = Path(__file__).parent / "results"
GARBAGE = "garbage"  # in place of a figure, where the guard finds samples to be that
PACKAGES = ("torch", "diffusers", "denoising-diffusion-pytorch", "smalldiffusion", "mlflow", "dvc")


def machine() -> dict:
    """What the figures depend on, but for noise."""
    describe = ["git", "describe", "--always", "--dirty"]
    has_git = shutil.which("git") is not None  # a machine lent for its GPU may not have it
    commit = subprocess.run(describe, cwd=ROOT, capture_output=True, text=True, check=False).stdout.strip() if has_git else ""
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    cpu += f" with {torch.backends.cpu.get_cpu_capability()}"  # the same name may be twice as fast
    gpu = [torch.cuda.get_device_name()] if torch.cuda.is_available() else []
    versions = {}
    for package in PACKAGES:
        try:
            versions[package] = version(package)
        except ImportError:
            continue  # nor DVC, nor MLflow
    return {
        "processor": ", ".join([f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads", *gpu]),
        "python": platform.python_version(),
        "versions": versions,
        "commit": commit or "?",
        "date": time.strftime("%Y-%m-%d"),
    }


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def own_environment() -> dict[str, str]:
    """This process's, without what an outer DVC or MLflow would tell the pipeline."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}


class Rates(list):
    """A log of training that keeps the images/s of every window, and nothing else."""

    def metrics(self, _step: int, values: dict[str, float]) -> None:
        self.extend(v for name, v in values.items() if name == "train/images_per_second")

    def preview(self, step: int, images: Tensor) -> None: ...

    def sync(self) -> None: ...


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device, times: int = 1) -> float:
    """Of one call, over `times` calls."""
    synchronise(device)
    began = time.perf_counter()
    for _ in range(times):
        work()
    synchronise(device)
    return (time.perf_counter() - began) / times


def products(device: torch.device, dtype: torch.dtype, size: int) -> dict[str, Callable[[], Tensor]]:
    """The product of two square matrices, by BLAS, and on a CPU also by oneDNN, as a convolution of 1 × 1 pixel.

    (oneDNN convolves for everyone here; BLAS has slow code for some makers' processors.)
    """
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    works = {"BLAS": lambda: a @ b}
    if device.type == "cpu":
        image, kernel = a.T.view(1, size, size, 1).contiguous(memory_format=torch.channels_last), b.view(size, size, 1, 1)
        works["oneDNN"] = lambda: F.conv2d(image, kernel)
    return works


def gemm_rate(device: torch.device, dtype: torch.dtype, size: int) -> float:
    """GFLOP/s of a product of two square matrices, the best of five: what the machine gives to dense algebra."""
    works = products(device, dtype, size).values()
    for work in works:
        work()  # warm-up
    return 2 * size**3 / min(seconds(work, device, 3) for work in works for _ in range(5)) / 1e9


def alternating(works: dict[str, Callable[[], object]], device: torch.device, repeats: int, times: int) -> dict[str, float]:
    """Median seconds of a call of each work; they take turns, so that a machine whose speed drifts treats them alike."""
    for work in works.values():
        work()  # warm-up
    taken = {name: [] for name in works}
    for _ in range(repeats):
        for name, work in works.items():
            taken[name].append(seconds(work, device, times))
    return {name: statistics.median(values) for name, values in taken.items()}


def gflop(work: Callable[[], object]) -> float:
    """GFLOP of the matrix products and convolutions in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() / 1e9


def drawn(model: Path, sampling: SampleParams, count: int, **changes: object) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] that the model draws, and their classes [N]."""
    p = sampling.model_copy(update={"classes": "all", "seed": SAMPLE_SEED, "count": count, **changes})
    pipeline, images, labels = Pipeline(ROOT / model, select_device("auto")), [], []
    pipeline.check(p)
    todo = label_batches(pipeline.class_ids(p), count, pipeline.batch_size)
    for first, classes in tqdm(todo, unit="batch", desc=" ".join(map(str, changes.values()))):
        *_, x = pipeline.iter_samples(classes, p, first)
        images.append(guard("this project", x))
        labels.append(classes)
    return torch.cat(images), torch.cat(labels)


@cache
def published(count: int, quick: bool = False, **changes: object) -> tuple[Tensor, Tensor]:
    """The same of the model that comes with the repository, as its card says but for these changes.

    Without changes, the first of the samples that its card's metrics are of: those that are at hand, or drawn again. `quick`:
    in few steps, for the short forms.
    """
    p, changes = pretrained.pretrained_sampling(ROOT), changes | ({"steps": 5} if quick else {})
    if not changes and (first := first_samples(ROOT / paths.PRETRAINED_SAMPLES, ROOT / paths.PRETRAINED, count)):
        images, labels = first
        return guard("this project", to_model_range(images)), labels
    return drawn(paths.PRETRAINED, p, count, **(changes or {"seed": p.seed}))


def first_samples(path: Path, model: Path, count: int) -> tuple[Tensor, Tensor] | None:
    """The first of the samples in a file, and their classes; None where it has fewer, or another model's, or isn't there."""
    if not path.exists():
        return None
    samples = read_samples(path)
    is_whole = len(samples.images) >= count and samples.checkpoint_sha256 == file_sha256(model)
    return (samples.images[:count], samples.labels[:count]) if is_whole else None


def evaluator() -> Classifier:
    return load_classifier(ROOT / CLASSIFIER)


def judge(images: Tensor) -> Callable[[Tensor], float]:
    """What gives the FID of samples, uint8 [N, 28, 28], against the real `images`, by this project's evaluator."""
    from ddpm.evaluation.metrics import fid  # what measures speed alone does without torchmetrics

    device, classifier = torch.device("cpu"), evaluator()
    real, _ = extract_cached(classifier, images, device, ROOT / ".cache")
    return lambda samples: fid(extract(classifier, samples, device)[0], real)


def keep(part: str, result: dict) -> None:
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{part}.json").write_text(json.dumps(result, indent=1) + "\n")


def kept(part: str) -> dict | None:
    path = RESULTS / f"{part}.json"
    return json.loads(path.read_text()) if path.exists() else None


def table(header: list[str], rows: list[list[object]]) -> str:
    """Markdown; the first column left, the others right."""
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in line) + " |" for line in lines)
