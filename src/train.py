"""Stage 2, `python src/train.py`: train the diffusion model that params.yaml describes.

Writes models/diffusion_model.pth, output/metrics/train.json and output/plots/{train,validation}.tsv. An interrupted run
resumes from its last saved state when it is started again.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from ddpm.checkpoint import save_checkpoint
from ddpm.data.dataset import Dataset, dataset_sha256, load_dataset
from ddpm.diffusion.schedule import terminal_warning
from ddpm.errors import UserError
from ddpm.figures import png, sheet
from ddpm.files import file_sha256, write_atomic
from ddpm.params import Params, RuntimeParams
from ddpm.params_file import load_params
from ddpm.paths import MODEL, PLOTS, TRAIN_METRICS, raw_folder
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import can_compile, enough_memory, free_memory, select_device
from ddpm.runtime.distributed import Group, is_worker
from ddpm.runtime.run_folder import fingerprint, imported_source
from ddpm.stage import run_stage
from ddpm.tracking.run import Run
from ddpm.training.loop import NoLog, Trained, train
from ddpm.training.memory import memory_needed
from ddpm.training.state import architecture
from ddpm.training.step import Execution, use_bfloat16
from ddpm.training.validation import PREVIEW_ROWS

GIB = 1 << 30


class RunLog:
    """Passes on to the MLflow run what the training loop reports."""

    def __init__(self, run: Run):
        self.metrics, self.sync, self.run = run.metrics, run.journal.sync, run

    def preview(self, step: int, images: Tensor) -> None:
        self.run.preview(step, png(sheet(images, columns=len(images) // PREVIEW_ROWS)))


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n\n")[0]).parse_args()
    params = load_params()
    p = params.train
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    if not is_worker() and (warning := terminal_warning(p.diffusion.schedule, p.diffusion.timesteps)):
        print(f"warning: train.diffusion: {warning}", file=sys.stderr)
    data = replace(load_dataset(params.data.name), mirror=params.data.mirror)
    check(params, data)
    if not is_worker():
        warn_of_memory(params, data, device)
    data_sha256 = dataset_sha256(params.data.name)

    def work(group: Group, folder: Path, run: Run | None) -> str:
        on_device = data.to(device)
        execution = how_to_execute(params.runtime, device, group)
        if run:
            profile = {"train_images": len(data.images), "test_images": len(data.test_images)}
            run.dataset(params.data.name, data_sha256[:32], str(raw_folder(params.data.name)), profile, "training")
        trained = train(p, on_device, folder, RunLog(run) if run else NoLog(), execution)
        if run is None:
            return ""
        write_outputs(trained, params, data)
        log_outputs(run, trained, params, data_sha256, execution)
        return f"{MODEL} after {p.steps:,} steps, validation loss {trained.validation_curve[-1]['loss']:.4f}"

    name = fingerprint({**p.model_dump(), "data": data_sha256, "mirror": data.mirror}, imported_source())
    with enough_memory(device, f"lower train.batch_size ({p.batch_size}) or train.model.channels ({p.model.channels})"):
        run_stage("train", params, device, name, work)


def check(params: Params, data: Dataset) -> None:
    """Raise UserError now, before any work, if a later stage couldn't do its work with this data."""
    architecture(params.train, data)
    try:
        params.sample.check(len(data.classes), params.data.name)
    except ValueError as error:
        raise UserError(f"params.yaml: {error}") from None
    evaluator = params.evaluate.classifier
    if evaluator != "auto" and not (Path(evaluator).is_file() and Path(evaluator).with_suffix(".json").is_file()):
        raise UserError(f"params.yaml: evaluate.classifier: {evaluator}, or its card, a .json file, is missing; use auto")


def warn_of_memory(params: Params, data: Dataset, device: torch.device) -> None:
    """Print a line if training may take more memory than is free."""
    p, runtime = params.train, params.runtime
    parts = runtime.accumulate * (runtime.processes if device.type == "cuda" else 1)  # without CUDA processes share memory
    needed = memory_needed(p, data, -(-p.batch_size // parts), 2 if use_bfloat16(p, device) else 4)
    if needed > (free := free_memory(device)):
        remedy = "lower train.batch_size or data.size, or raise runtime.accumulate"
        print(
            f"warning: training may take {needed / GIB:.1f} GiB of memory; {free / GIB:.1f} are free: {remedy}", file=sys.stderr
        )


def how_to_execute(runtime: RuntimeParams, device: torch.device, group: Group) -> Execution:
    compile_model = can_compile(device) if runtime.compile == "auto" else runtime.compile
    return Execution(device, compile_model, group, runtime.accumulate, runtime.state_seconds)


def write_outputs(trained: Trained, params: Params, data: Dataset) -> None:
    p = params.train
    label_dropout = p.label_dropout if data.classes else 1.0  # without classes no image was shown with one
    unet, diffusion = architecture(p, data), p.diffusion.model_dump()
    save_checkpoint(MODEL, trained.weights, unet, diffusion, label_dropout, data.classes, trained.guide)
    for name, curve in (("train", trained.train_curve), ("validation", trained.validation_curve)):
        lines = ["\t".join(curve[0])] + [
            "\t".join(str(value) if isinstance(value, int) else f"{value:.6g}" for value in row.values()) for row in curve
        ]
        write_atomic(PLOTS / f"{name}.tsv", ("\n".join(lines) + "\n").encode())
    last = trained.train_curve[-100:]
    metrics = {
        "train_loss": sum(row["loss"] for row in last) / len(last),
        "val_loss": trained.validation_curve[-1]["loss"],
        "parameters": sum(w.numel() for w in trained.weights.values()),
    }
    write_atomic(TRAIN_METRICS, (json.dumps(metrics, indent=2) + "\n").encode())


def log_outputs(run: Run, trained: Trained, params: Params, data_sha256: str, execution: Execution) -> None:
    about = {
        "checkpoint_sha256": file_sha256(MODEL),
        "data_sha256": data_sha256,
        "precision": "bfloat16" if use_bfloat16(params.train, execution.device) else "float32",
        "parameters": sum(w.numel() for w in trained.weights.values()),
        "processes": execution.group.world_size,
    }
    run.artifact(MODEL, "model")
    run.tags(about)
    run.model(params.model_dump(include={"data", "train"}), about)


if __name__ == "__main__":
    with clean_errors():
        main()
