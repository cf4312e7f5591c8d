"""Stage 4, `python src/evaluate.py`: how good the samples in output/samples.npz are, beside what real images score.

Writes output/metrics/evaluate.json and output/nearest_neighbours.png.
"""

import argparse
import hashlib
import json
from pathlib import Path

import numpy as np
import torch
import yaml
from torch import Tensor

from ddpm import tracking
from ddpm.data import Data, digest, load_data
from ddpm.device import enough_memory, select_device
from ddpm.distributed import Group
from ddpm.features import TURNS, Classifier, extract, extract_cached, load_classifier
from ddpm.figures import save_png, sheet
from ddpm.files import file_md5, file_sha256, sha256, write_atomic
from ddpm.metrics import fid, kid, memorisation, nearest, prdc
from ddpm.params import Params, SampleParams, UserError, clean_errors, load_params, project_root
from ddpm.resume import fingerprint, imported_source
from ddpm.stage import perform

MODEL = Path("models/diffusion_model.pth")
SAMPLES = Path("output/samples.npz")
METRICS = Path("output/metrics/evaluate.json")
NEIGHBOURS = Path("output/nearest_neighbours.png")
ANEW = "`dvc repro sample` makes it anew"
FLOOR_DRAWS = 5
PAIRS = 12  # closest pairs shown
REFERENCES = 100_000  # real images to compare with, at most


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    params = load_params()
    device = select_device(params.runtime.device, tf32=False, deterministic=params.runtime.deterministic)
    path = Path(params.evaluate.classifier)
    classifier = load_classifier(path, params.data.name)
    images, labels, checkpoint = load_samples(SAMPLES)
    data = load_data(params.data.name).thinned(REFERENCES)
    if images.shape[1:] != data.images.shape[1:]:
        raise UserError(f"{SAMPLES}: images are {sizes(images)}, {params.data.name}'s {sizes(data.images)}; {ANEW}")
    if (classifier.channels, classifier.classes) != (data.image_shape[0], len(data.classes) or TURNS):
        anew = f"`python src/train_classifier.py --out {path}` makes it anew"
        raise UserError(f"{path}: trained on {params.data.name} as it was before, with other classes or colours; {anew}")
    judged = {**params.evaluate.model_dump(), "data": digest(params.data.name)}
    name = fingerprint(judged, [*imported_source(), SAMPLES, path])

    def work(group: Group, folder: Path) -> None:
        if group.first:
            track_evaluation(params, device, classifier, data, images, labels, checkpoint, folder, group)
        else:
            features(classifier, images, data, device, group)

    with enough_memory(device, "close what else uses it"):
        perform(work, name, params.runtime.processes, device)


def features(
    classifier: Classifier, images: Tensor, data: Data, device: torch.device, group: Group
) -> tuple[tuple[Tensor, Tensor], ...]:
    """Features and predicted classes of the samples, of the images that they are compared with, and of those for testing."""
    cache = project_root() / ".cache"
    return (
        extract(classifier, images, device, group=group),
        extract_cached(classifier, data.images, device, cache, group),
        extract_cached(classifier, data.test_images, device, cache, group),
    )


def track_evaluation(
    params: Params,
    device: torch.device,
    classifier: Classifier,
    data: Data,
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
    with tracking.start_run("evaluate", told, root, folder, str(device), required, checkpoint) as run:
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


def sizes(images: Tensor) -> str:
    return "×".join(map(str, images.shape[1:]))


def load_samples(path: Path) -> tuple[Tensor, Tensor, str | None]:
    """Images uint8 [N, H, H] or [N, H, H, 3], labels int64 [N], -1 for no class, and the model's SHA-256 if it is known.

    Raises UserError if the file isn't that.
    """
    try:
        with np.load(path) as archive:
            images, labels = torch.from_numpy(archive["images"]), torch.from_numpy(archive["labels"])
            checkpoint = str(archive["checkpoint_sha256"]) if "checkpoint_sha256" in archive else None
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; `dvc repro sample` makes it") from None
    except Exception:  # zipfile, zlib and numpy's header parser each have their own for a changed byte
        raise UserError(f"{path}: damaged, or without images and labels; {ANEW}") from None
    kinds = (images.dtype, labels.dtype)
    if kinds != (torch.uint8, torch.int64) or len(images.shape) not in (3, 4) or labels.shape != images.shape[:1]:
        raise UserError(f"{path}: images must be uint8 [N, H, H] or [N, H, H, 3] with N int64 labels; {ANEW}")
    return images, labels, checkpoint


def class_balanced(pool: Tensor, labels: Tensor, draw: int) -> Tensor | None:
    """Indices into the labels `pool` of as many images of each class as `labels` has, drawn without replacement.

    Labels of -1 stand for every class equally. None if some class has too few, or there are fewer labels than classes.
    """
    known, classes = labels[labels >= 0], pool.max().item() + 1
    counts = torch.bincount(known, minlength=classes) + (len(labels) - len(known)) // classes
    if not counts.any():
        return None
    generator = torch.Generator().manual_seed(draw)
    order = torch.randperm(len(pool), generator=generator)
    indices = []
    for c, count in enumerate(counts.tolist()):
        of_class = order[pool[order] == c]
        if len(of_class) < count:
            return None
        indices.append(of_class[:count])
    return torch.cat(indices)


def floors(train: Tensor, test: Tensor, data: Data, labels: Tensor, draws: list[Tensor]) -> dict[str, float]:
    """What as many real images score against the same references: no model can be expected to do better."""
    floors = {"fid_floor": torch.tensor([fid(test[draw], train) for draw in draws])}
    others = [class_balanced(data.labels, labels, draw) for draw in range(FLOOR_DRAWS)]
    if others[0] is not None:
        floors["fid_test_floor"] = torch.tensor([fid(train[draw], test) for draw in others])
    floors["kid_floor"] = torch.tensor([kid(test[draw], train) for draw in draws])
    means = {name: values.mean().item() for name, values in floors.items()}
    return means | {f"{name}_std": values.std().item() for name, values in floors.items() if len(values) > 1}


def neighbours(
    images: Tensor, samples: Tensor, train_images: Tensor, train: Tensor, test_images: Tensor, test: Tensor
) -> dict[str, float]:
    """Are the samples copies? Nearest training images of samples and of test images, in pixels and in features."""
    metrics, rows = {}, []
    for suffix, mine, reference, unseen in (("", images, train_images, test_images), ("_features", samples, train, test)):
        distance, index = nearest(mine, reference)
        ratio, share = memorisation(distance, nearest(unseen, reference)[0])
        metrics |= {f"nearest_neighbour_ratio{suffix}": ratio, f"closer_than_test{suffix}": share}
        closest = distance.argsort()[:PAIRS]
        rows += [images[closest], train_images[index[closest]]]
    names = ["sample", "nearest in pixels", "sample", "nearest in features"]
    save_png(NEIGHBOURS, sheet(torch.cat(rows), len(closest), names))
    return metrics


if __name__ == "__main__":
    with clean_errors():
        main()
