"""Stage 2, `python src/train.py`: train the diffusion model that params.yaml describes.

Writes models/diffusion_model.pth, output/metrics/train.json and output/plots/{train,validation}.tsv. An interrupted run
goes on where its last saved state is when it is started again.
"""

import hashlib
import json
import sys
from pathlib import Path

import torch
from torch import Tensor

from ddpm import tracking
from ddpm.checkpoint import save_model
from ddpm.data import CLASSES, FILES, RAW, load_split
from ddpm.device import can_compile, enough_memory, select_device
from ddpm.figures import png, sheet
from ddpm.files import file_sha256, write_atomic
from ddpm.params import Params, clean_errors, load_params, project_root
from ddpm.resume import fingerprint, imported_source, run_folder
from ddpm.schedule import terminal_warning
from ddpm.training import Data, Trained, train, use_bfloat16

MODEL = Path("models/diffusion_model.pth")
METRICS = Path("output/metrics/train.json")
PLOTS = Path("output/plots")


class RunLog:
    """What the training loop reports, into the MLflow run."""

    def __init__(self, run: tracking.Run):
        self.metrics, self.sync, self.run = run.metrics, run.journal.sync, run

    def preview(self, step: int, images: Tensor) -> None:
        self.run.preview(step, png(sheet(images, columns=len(CLASSES))))


def main() -> None:
    params = load_params()
    p = params.train
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    if warning := terminal_warning(p.diffusion.schedule, p.diffusion.timesteps):
        print(f"warning: train.diffusion: {warning}", file=sys.stderr)
    compile_model = can_compile(device) if params.runtime.compile == "auto" else params.runtime.compile
    too_large = f"lower train.batch_size ({p.batch_size}) or train.model.channels ({p.model.channels})"
    with enough_memory(device, too_large):
        data = Data(*(x.to(device) for split in ("train", "test") for x in load_split(RAW, split)))
        name = fingerprint(p.model_dump(), [*imported_source(), *(RAW / file for file in FILES)])
        with run_folder(project_root() / ".resume" / name) as folder:
            track_training(params, data, device, folder, compile_model)


def track_training(params: Params, data: Data, device: torch.device, folder: Path, compile_model: bool) -> None:
    """Train from the states in `folder`, write the outputs, and log it all as one MLflow run."""
    p, root, required = params.train, project_root(), params.runtime.require_mlflow
    with tracking.start_run("train", params.model_dump(), root, folder, str(device), required) as run:
        digest = hashlib.sha256("".join(FILES.values()).encode()).hexdigest()
        profile = {"train_images": len(data.images), "test_images": len(data.test_images)}
        run.dataset("fashion-mnist", digest[:32], str(RAW), profile, "training")
        trained = train(p, data, device, folder, RunLog(run), compile_model)
        write_outputs(trained, params)
        run.artifact(MODEL, "model")
        run.tags(
            {
                "checkpoint_sha256": file_sha256(MODEL),
                "data_sha256": digest,
                "precision": "bfloat16" if use_bfloat16(p, device) else "float32",
                "parameters": sum(w.numel() for w in trained.weights.values()),
            }
        )


def write_outputs(trained: Trained, params: Params) -> None:
    p = params.train
    save_model(MODEL, trained.weights, p.model.model_dump(), p.diffusion.model_dump(), p.label_dropout)
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
    write_atomic(METRICS, (json.dumps(metrics, indent=2) + "\n").encode())


if __name__ == "__main__":
    with clean_errors():
        main()
