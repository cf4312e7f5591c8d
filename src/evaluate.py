"""Stage 4, `python src/evaluate.py`: how good the samples in output/samples.npz are, beside what real images score.

Writes output/metrics/evaluate.json and output/nearest_neighbours.png.
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ddpm.data.archive import ANEW, read_samples
from ddpm.data.dataset import Dataset, dataset_sha256, load_dataset
from ddpm.errors import UserError
from ddpm.evaluation.classifier import TURNS, Classifier, load_classifier
from ddpm.evaluation.judge import FLOOR_DRAWS, REFERENCES, class_balanced, features, floors, neighbours
from ddpm.evaluation.metrics import fid, kid, prdc
from ddpm.files import file_md5, file_sha256, sha256, write_atomic
from ddpm.params import Params
from ddpm.params_file import load_params
from ddpm.paths import EVALUATION_METRICS, MODEL, NEIGHBOURS, SAMPLES, project_root
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import enough_memory, select_device
from ddpm.runtime.distributed import Group
from ddpm.runtime.run_folder import fingerprint, imported_source
from ddpm.stage import run_stage
from ddpm.tracking.provenance import drawn_from
from ddpm.tracking.run import start_run


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    params = load_params()
    device = select_device(params.runtime.device, tf32=False, deterministic=params.runtime.deterministic)
    path = Path(params.evaluate.classifier)
    classifier = load_classifier(path, params.data.name)
    images, labels, checkpoint = read_samples(SAMPLES)
    data = load_dataset(params.data.name).subsample(REFERENCES)
    if images.shape[1:] != data.images.shape[1:]:
        raise UserError(f"{SAMPLES}: images are {sizes(images)}, {params.data.name}'s {sizes(data.images)}; {ANEW}")
    if (classifier.channels, classifier.classes) != (data.image_shape[0], len(data.classes) or TURNS):
        anew = f"`python src/train_classifier.py --out {path}` makes it anew"
        raise UserError(f"{path}: trained on {params.data.name} as it was before, with other classes or colours; {anew}")
    judged = {**params.evaluate.model_dump(), "data": dataset_sha256(params.data.name)}
    name = fingerprint(judged, [*imported_source(), SAMPLES, path])

    def work(group: Group, folder: Path) -> None:
        if group.is_main:
            track_evaluation(params, device, classifier, data, images, labels, checkpoint, folder, group)
        else:
            features(classifier, images, data, device, group)

    with enough_memory(device, "close what else uses it"):
        run_stage(work, name, params.runtime.processes, device)


def track_evaluation(
    params: Params,
    device: torch.device,
    classifier: Classifier,
    data: Dataset,
    images: Tensor,
    labels: Tensor,
    checkpoint: str | None,
    folder: Path,
    group: Group,
) -> None:
    """Judge the samples, write the outputs, and log it all as one MLflow run."""
    root, required, path = project_root(), params.runtime.require_mlflow, Path(params.evaluate.classifier)
    model = MODEL.read_bytes() if MODEL.exists() else None  # at once: it may be replaced meanwhile
    ours = model is not None and sha256(model) == checkpoint
    vouched_for = ours and drawn_from(model, params.sample)
    told = params.model_dump(exclude=None if ours else {"train"})  # which is not of another model
    with start_run("evaluate", told, root, folder, str(device), required, checkpoint) as run:
        run.tags({"samples": len(images), "samples_md5": file_md5(SAMPLES), "evaluator_sha256": file_sha256(path)})
        (samples, predicted), (train, _), (test, test_predicted) = features(classifier, images, data, device, group)
        metrics = {
            "fid": fid(samples, train),
            "fid_test": fid(samples, test),
            "kid": kid(samples, train),
        }
        n = min(len(images), len(test))
        count = 1 if len(images) == len(test) else FLOOR_DRAWS
        draws = [class_balanced(data.test_labels, labels, draw) for draw in range(count)]
        if draws[0] is not None:
            metrics |= floors(train, test, data, labels, draws)
            real = test[draws[0]]
        else:  # more samples of a class than there are test images of it: no floor at equal n
            real = test
        metrics |= prdc(samples[:n], real)
        if (real_draw := class_balanced(data.labels, labels[:n], 0)) is not None:
            metrics |= {f"{name}_real": value for name, value in prdc(train[real_draw], real).items()}
        if (labels >= 0).all():
            metrics["class_accuracy"] = (predicted == labels).float().mean().item()
        if data.classes:
            metrics["class_accuracy_real"] = (test_predicted == data.test_labels).float().mean().item()
        unseen = slice(None) if draws[0] is None else draws[0]
        metrics |= neighbours(images, samples, data.images, train, data.test_images[unseen], test[unseen])

        write_atomic(EVALUATION_METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
        beside = f", {metrics['fid'] / metrics['fid_floor']:.0f} × the floor of real images" if "fid_floor" in metrics else ""
        print(f"fid {metrics['fid']:.4f}{beside}; the rest is in {EVALUATION_METRICS}")
        values = {f"eval/{name}": value for name, value in metrics.items()}
        run.metrics(0, values)
        run.best_evaluation(values)
        run.artifact(EVALUATION_METRICS)
        run.artifact(NEIGHBOURS)
        if vouched_for and np.isfinite(metrics["fid"]):
            run.register(model, params.sample.model_dump())


def sizes(images: Tensor) -> str:
    return "×".join(map(str, images.shape[1:]))


if __name__ == "__main__":
    with clean_errors():
        main()
