"""Stage 4, `python src/evaluate.py`: measure how good the samples in output/samples.npz are, compared with real images.

Writes output/metrics/evaluate.json and output/nearest_neighbours.png.
"""

import argparse
import json
import math
from pathlib import Path

from torch import Tensor

from ddpm.data.dataset import Dataset, dataset_sha256, load_dataset
from ddpm.data.samples_file import REMEDY, Samples, read_samples
from ddpm.errors import UserError
from ddpm.evaluation.classifier import MADE_BY, TURNS, Classifier, load_classifier
from ddpm.evaluation.judge import REFERENCES, extract_all, judge
from ddpm.figures import save_png
from ddpm.files import file_md5, file_sha256, sha256, write_atomic
from ddpm.params_file import load_params
from ddpm.paths import CACHE, EVALUATION_METRICS, MODEL, NEIGHBOURS, SAMPLES, project_root, raw_folder
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import enough_memory, select_device
from ddpm.runtime.distributed import Group
from ddpm.runtime.run_folder import fingerprint, imported_source
from ddpm.stage import run_stage
from ddpm.tracking.provenance import drawn_from
from ddpm.tracking.run import Run

NEXT_STEPS = "Next: `make compare` ranks your experiments, `make ui` shows curves and pictures, `make report` writes a page."


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    params = load_params()
    device = select_device(params.runtime.device, tf32=False, deterministic=params.runtime.deterministic)
    path = Path(params.evaluate.classifier)
    classifier = load_classifier(path, params.data.name)
    samples = read_samples(SAMPLES)
    whole, data_sha256 = load_dataset(params.data.name), dataset_sha256(params.data.name)
    profile = {"train_images": len(whole.images), "test_images": len(whole.test_images)}
    data = whole.subsample(REFERENCES)
    check(samples, data, classifier, params.data.name, path)
    model = MODEL.read_bytes() if MODEL.exists() else None  # read once: another run may replace it meanwhile
    trained_here = model is not None and sha256(model) == samples.checkpoint_sha256
    to_register = model if model and trained_here and drawn_from(model, params.sample) else None

    def work(group: Group, folder: Path, run: Run | None) -> str:
        if run:
            hashes = {"samples_md5": file_md5(SAMPLES), "evaluator_sha256": file_sha256(path), "data_sha256": data_sha256}
            run.tags({"samples": len(samples.images), **hashes})
            run.dataset(params.data.name, data_sha256[:32], str(raw_folder(params.data.name)), profile, "evaluation")
        features = extract_all(classifier, samples.images, data, device, project_root() / CACHE, group)
        if run is None:
            return ""
        metrics, picture = judge(samples, data, features)
        save_png(NEIGHBOURS, picture)
        write_atomic(EVALUATION_METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
        over_floor = {"fid_over_floor": metrics["fid"] / metrics["fid_floor"]} if "fid_floor" in metrics else {}
        values = {f"eval/{name}": value for name, value in {**metrics, **over_floor}.items()}
        run.metrics(0, values)
        run.best_evaluation(values)
        run.artifact(EVALUATION_METRICS)
        run.artifact(NEIGHBOURS)
        if to_register and math.isfinite(metrics["fid"]):
            run.register(to_register, params.sample.model_dump())
        floor = f", {over_floor['fid_over_floor']:.0f} × the floor of real images" if over_floor else ""
        return f"fid {metrics['fid']:.4f}{floor}; all metrics are in {EVALUATION_METRICS}"

    judged = {**params.evaluate.model_dump(), "data": data_sha256}
    name = fingerprint(judged, [*imported_source(), SAMPLES, path])
    with enough_memory(device, "close other programs that use this device"):
        run_stage("evaluate", params, device, name, work, samples.checkpoint_sha256, trained_here, NEXT_STEPS)


def check(samples: Samples, data: Dataset, classifier: Classifier, name: str, path: Path) -> None:
    """Raise UserError if samples, data set and classifier don't belong together."""
    if samples.images.shape[1:] != data.images.shape[1:]:
        raise UserError(f"{SAMPLES}: images are {sizes(samples.images)}, {name}'s {sizes(data.images)}; {REMEDY}")
    if (classifier.channels, classifier.classes) != (data.image_shape[0], len(data.classes) or TURNS):
        remedy = f"`{MADE_BY} --out {path}` trains it again"
        raise UserError(f"{path}: trained on an earlier {name} with other classes or colours; {remedy}")


def sizes(images: Tensor) -> str:
    return "×".join(map(str, images.shape[1:]))


if __name__ == "__main__":
    with clean_errors():
        main()
