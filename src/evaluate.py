"""Stage 4, `python src/evaluate.py`: measure how good the samples in output/samples.npz are, compared with real images.

Writes output/metrics/evaluate.json and output/nearest_neighbours.png.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from torch import Tensor

from ddpm.data.dataset import dataset_sha256, load_dataset
from ddpm.data.samples_file import REMEDY, read_samples
from ddpm.errors import UserError
from ddpm.evaluation.evaluator import doubts, find_evaluator
from ddpm.evaluation.judge import REFERENCES, comparable_samples, extract_all, judge
from ddpm.figures import save_png
from ddpm.files import file_md5, sha256, write_atomic
from ddpm.params_file import load_params
from ddpm.paths import CACHE, EVALUATION_METRICS, MODEL, NEIGHBOURS, SAMPLES, project_root, raw_folder
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import enough_memory, select_device
from ddpm.runtime.distributed import Group
from ddpm.runtime.run_folder import fingerprint, imported_source
from ddpm.stage import run_stage
from ddpm.tracking.provenance import drawn_from
from ddpm.tracking.run import Run

HASH_DIGITS = 12
NEXT_STEPS = "Next: `make compare` ranks your experiments, `make ui` shows curves and pictures, `make report` writes a page."


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    params = load_params()
    device = select_device(params.runtime.device, tf32=False, deterministic=params.runtime.deterministic)
    drawn = read_samples(SAMPLES)
    whole, data_sha256 = load_dataset(params.data.name), dataset_sha256(params.data.name)
    profile = {"train_images": len(whole.images), "test_images": len(whole.test_images)}
    data = whole.subsample(REFERENCES)
    if drawn.images.shape[1:] != data.images.shape[1:]:
        raise UserError(f"{SAMPLES}: images are {sizes(drawn.images)}, {params.data.name}'s {sizes(data.images)}; {REMEDY}")
    samples, cache = comparable_samples(drawn, data), project_root() / CACHE
    with enough_memory(device, "close other programs that use this device"):
        evaluator = find_evaluator(params.evaluate.classifier, params.data.name, data, data_sha256, cache, device)
    model = MODEL.read_bytes() if MODEL.exists() else None  # read once: another run may replace it meanwhile
    trained_here = model is not None and sha256(model) == samples.checkpoint_sha256
    to_register = model if model and trained_here and drawn_from(model, params.sample) else None

    def work(group: Group, folder: Path, run: Run | None) -> str:
        if group.broadcast(evaluator.sha256) != evaluator.sha256:  # of several machines each has trained its own
            raise UserError(
                f"{evaluator.path}: not the evaluator of the first process; copy that one, with its card, to all machines"
            )
        if run:
            hashes = {"samples_md5": file_md5(SAMPLES), "evaluator_sha256": evaluator.sha256, "data_sha256": data_sha256}
            run.tags({"samples": len(samples.images), **hashes})
            run.dataset(params.data.name, data_sha256[:32], str(raw_folder(params.data.name)), profile, "evaluation")
        features = extract_all(evaluator.classifier, samples.images, data, device, cache, group)
        if run is None:
            return ""
        metrics, picture = judge(samples, data, features, device)
        save_png(NEIGHBOURS, picture)
        judged_by = {"evaluator": evaluator.sha256[:HASH_DIGITS], "data": data_sha256[:HASH_DIGITS]}
        write_atomic(EVALUATION_METRICS, (json.dumps(metrics | judged_by, indent=2) + "\n").encode())
        over_floor = metrics["fid"] / max(metrics["fid_floor"], 1e-12)  # 0 if all images are alike
        more = {"fid_over_floor": over_floor, "evaluator_accuracy": evaluator.accuracy}
        values = {f"eval/{name}": value for name, value in {**metrics, **more}.items()}
        run.metrics(0, values)
        run.best_evaluation(values)
        run.artifact(EVALUATION_METRICS)
        run.artifact(NEIGHBOURS)
        if to_register and math.isfinite(metrics["fid"]):
            run.register(to_register, params.sample.model_dump())
        if doubt := doubts(evaluator.accuracy, data):
            print(f"warning: {doubt}", file=sys.stderr)
        fewer = f" of the first {len(samples.images):,} samples" if len(samples.images) < len(drawn.images) else ""
        floor = f"{over_floor:.0f} × the floor of real images"
        return f"fid {metrics['fid']:.4f}{fewer}, {floor}; all metrics are in {EVALUATION_METRICS}"

    judged = {**params.evaluate.model_dump(), "data": data_sha256}
    name = fingerprint(judged, [*imported_source(), SAMPLES, evaluator.path])
    with enough_memory(device, "close other programs that use this device"):
        run_stage("evaluate", params, device, name, work, samples.checkpoint_sha256, trained_here, NEXT_STEPS)


def sizes(images: Tensor) -> str:
    return "×".join(map(str, images.shape[1:]))


if __name__ == "__main__":
    with clean_errors():
        main()
