"""Stage 4, `python src/evaluate.py`: how good the samples in output/samples.npz are, beside what real images score.

Writes output/metrics/evaluate.json and output/nearest_neighbours.png.
"""

import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from ddpm import tracking
from ddpm.data import CLASSES, RAW, load_split
from ddpm.device import enough_memory, select_device
from ddpm.features import extract, extract_cached, load_classifier
from ddpm.figures import save_png, sheet
from ddpm.files import file_md5, file_sha256, sha256, write_atomic
from ddpm.metrics import fid, kid, memorisation, nearest, prdc
from ddpm.params import SampleParams, UserError, clean_errors, load_params, project_root
from ddpm.resume import fingerprint, imported_source, run_folder

MODEL = Path("models/diffusion_model.pth")
SAMPLES = Path("output/samples.npz")
METRICS = Path("output/metrics/evaluate.json")
NEIGHBOURS = Path("output/nearest_neighbours.png")
FLOOR_DRAWS = 5
PAIRS = 12  # closest pairs shown


def main() -> None:
    params = load_params()
    device = select_device(params.runtime.device, tf32=False, deterministic=params.runtime.deterministic)
    path = Path(params.evaluate.classifier)
    classifier = load_classifier(path)
    images, labels = load_samples(SAMPLES)
    train_images, train_labels = load_split(RAW, "train")
    test_images, test_labels = load_split(RAW, "test")

    root, required = project_root(), params.runtime.require_mlflow
    model = MODEL.read_bytes() if MODEL.exists() else None  # at once: it may be replaced meanwhile
    checkpoint = None if model is None else sha256(model)
    vouched_for = model is not None and drawn_from(model, params.sample)
    name = fingerprint(params.evaluate.model_dump(), [*imported_source(), SAMPLES, path])
    with (
        enough_memory(device, "close what else uses it"),
        run_folder(root / ".resume" / name) as folder,
        tracking.start_run("evaluate", params.model_dump(), root, folder, str(device), required, checkpoint) as run,
    ):
        run.tags({"samples": len(images), "samples_md5": file_md5(SAMPLES), "evaluator_sha256": file_sha256(path)})
        cache = root / ".cache"
        samples, predicted = extract(classifier, images, device)
        train, _ = extract_cached(classifier, train_images, device, cache)
        test, test_predicted = extract_cached(classifier, test_images, device, cache)
        metrics = {
            "fid": fid(samples, train),
            "fid_test": fid(samples, test),
            "kid": kid(samples, train),
        }
        n = min(len(images), len(test))
        draws = [class_balanced(test_labels, labels, draw) for draw in range(1 if len(images) == len(test) else FLOOR_DRAWS)]
        if draws[0] is not None:
            metrics |= floors(train, test, train_labels, labels, draws)
            real = test[draws[0]]
        else:  # more samples of a class than there are test images of it: no floor at equal n
            real = test
        metrics |= prdc(samples[:n], real)
        if (real_draw := class_balanced(train_labels, labels[:n], 0)) is not None:
            metrics |= {f"{name}_real": value for name, value in prdc(train[real_draw], real).items()}
        if (labels >= 0).all():
            metrics["class_accuracy"] = (predicted == labels).float().mean().item()
        metrics["class_accuracy_real"] = (test_predicted == test_labels).float().mean().item()
        unseen = slice(None) if draws[0] is None else draws[0]
        metrics |= neighbours(images, samples, train_images, train, test_images[unseen], test[unseen])

        write_atomic(METRICS, (json.dumps(metrics, indent=2) + "\n").encode())
        beside = f", {metrics['fid'] / metrics['fid_floor']:.0f} × the floor of real images" if "fid_floor" in metrics else ""
        print(f"fid {metrics['fid']:.4f}{beside}; the rest is in {METRICS}")
        values = {f"eval/{name}": value for name, value in metrics.items()}
        run.metrics(0, values)
        run.best_evaluation(values)
        run.artifact(METRICS)
        run.artifact(NEIGHBOURS)
        if vouched_for and np.isfinite(metrics["fid"]):
            run.register(model, params.sample.model_dump())


def drawn_from(model: bytes, sampling: SampleParams) -> bool:
    """Whether DVC has it that the samples at hand were drawn from this model, in this way."""
    try:
        stage = yaml.safe_load(Path("dvc.lock").read_text())["stages"]["sample"]
        made = {item["path"]: item["md5"] for item in stage["deps"] + stage["outs"]}
        now = {MODEL.as_posix(): hashlib.md5(model).hexdigest(), SAMPLES.as_posix(): file_md5(SAMPLES)}
        return now.items() <= made.items() and stage["params"]["params.yaml"]["sample"] == sampling.model_dump()
    except (OSError, KeyError, TypeError, yaml.YAMLError):
        return False


def load_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Images uint8 [N, 28, 28] and labels int64 [N], -1 for no class. Raises UserError if the file isn't that."""
    try:
        with np.load(path) as archive:
            images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `dvc repro sample` makes it") from None
    except Exception:  # zipfile, zlib and numpy's header parser each have their own for a changed byte
        raise UserError(f"{path}: damaged, or without images and labels; `dvc repro sample` makes it anew") from None
    kinds, shapes = (images.dtype, labels.dtype), (images.shape[1:], labels.shape)
    if kinds != (torch.uint8, torch.int64) or shapes != ((28, 28), images.shape[:1]):
        raise UserError(f"{path}: images must be uint8 [N, 28, 28] with N int64 labels; `dvc repro sample` makes it anew")
    return images, labels


def class_balanced(pool: Tensor, labels: Tensor, draw: int) -> Tensor | None:
    """Indices into the labels `pool` of as many images of each class as `labels` has, drawn without replacement.

    Labels of -1 stand for every class equally. None if some class has too few.
    """
    known = labels[labels >= 0]
    counts = torch.bincount(known, minlength=len(CLASSES)) + (len(labels) - len(known)) // len(CLASSES)
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(pool), generator=generator)
    indices = []
    for c, count in enumerate(counts.tolist()):
        of_class = order[pool[order] == c]
        if len(of_class) < count:
            return None
        indices.append(of_class[:count])
    return torch.cat(indices)


def floors(train: Tensor, test: Tensor, train_labels: Tensor, labels: Tensor, draws: list[Tensor]) -> dict[str, float]:
    """What as many real images score against the same references: no model can be expected to do better."""
    against_train = torch.tensor([fid(test[draw], train) for draw in draws])
    against_test = torch.tensor([fid(train[class_balanced(train_labels, labels, d)], test) for d in range(FLOOR_DRAWS)])
    kids = torch.tensor([kid(test[draw], train) for draw in draws])
    floors = {"fid_floor": against_train, "fid_test_floor": against_test, "kid_floor": kids}
    means = {name: values.mean().item() for name, values in floors.items()}
    return means | {f"{name}_std": values.std().item() for name, values in floors.items() if len(values) > 1}


def neighbours(
    images: Tensor, samples: Tensor, train_images: Tensor, train: Tensor, test_images: Tensor, test: Tensor
) -> dict[str, float]:
    """Are the samples copies? Nearest training images of samples and of test images, in pixels and in features."""
    metrics, rows = {}, []
    for suffix, mine, reference, unseen in (
        ("", *(x.flatten(1).float() / 255 for x in (images, train_images, test_images))),
        ("_features", samples, train, test),
    ):
        distance, index = nearest(mine, reference)
        ratio, share = memorisation(distance, nearest(unseen, reference)[0])
        metrics |= {f"nearest_neighbour_ratio{suffix}": ratio, f"closer_than_test{suffix}": share}
        closest = distance.argsort()[:PAIRS]
        rows += [images[closest], train_images[index[closest]]]
    names = ["sample", "nearest in pixels", "sample", "nearest in features"]
    save_png(NEIGHBOURS, sheet(torch.cat(rows), PAIRS, names))
    return metrics


if __name__ == "__main__":
    with clean_errors():
        main()
