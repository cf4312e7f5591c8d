"""Where a training step's time goes, and what tracking it with MLflow costs."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from contenders import NULL_CLASS, ROOT, SHAPE
from ddpm.data.fashion_mnist import load_split
from ddpm.data.pixels import to_model_range
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.unet import UNet
from ddpm.params import TrainParams
from ddpm.params_file import load_params
from ddpm.tracking.run import start_run
from ddpm.training.batches import draw
from ddpm.training.optim import ema_decay, make_optimizers
from ddpm.training.step import GRAD_CLIP, batch_loss
from ddpm.training.window import WINDOW
from measure import table

PARTS = ("data", "forward", "backward", "clipping and optimiser", "average of the weights")


def run(full: bool) -> dict:
    steps = 200 if full else 40
    p = load_params(ROOT / "params.yaml").train
    taken = breakdown(p, steps)
    adamw = breakdown(p.model_copy(update={"optimizer": "adamw"}), steps)
    return {"steps": steps, "seconds": taken, "adamw_seconds": adamw, "mlflow_seconds": logging_cost(steps, sum(taken.values()))}


def breakdown(p: TrainParams, steps: int) -> dict[str, float]:
    """Median seconds of each part of a step, on the CPU."""
    images, labels = load_split(ROOT / "data/FashionMNIST/raw", "train")
    model = UNet(**p.model.model_dump()).to(memory_format=torch.channels_last)
    average = [w.detach().clone() for w in model.parameters()]
    diffusion = Diffusion(**p.diffusion.model_dump())
    optimizers, weights = make_optimizers(p, model), list(model.parameters())
    taken: dict[str, list[float]] = {part: [] for part in PARTS}
    for step in range(steps + 5):
        clock = [time.perf_counter()]
        batch, t, eps, dropped, _ = draw(p, step, len(images), SHAPE, diffusion)
        x0, y = to_model_range(images[batch]), labels[batch].masked_fill(dropped, NULL_CLASS)
        clock.append(time.perf_counter())
        model.zero_grad()
        loss = batch_loss(model, diffusion, x0, y, t, eps)
        clock.append(time.perf_counter())
        loss.backward()
        clock.append(time.perf_counter())
        torch.nn.utils.clip_grad_norm_(weights, GRAD_CLIP)
        for optimizer in optimizers:
            optimizer.step()
        clock.append(time.perf_counter())
        with torch.no_grad():
            torch._foreach_lerp_(average, weights, 1 - ema_decay(p, step))
        clock.append(time.perf_counter())
        if step >= 5:  # warm by then
            for part, began, ended in zip(PARTS, clock, clock[1:], strict=False):
                taken[part].append(ended - began)
    return {part: statistics.median(values) for part, values in taken.items()}


def logging_cost(steps: int, pace: float) -> float:
    """Processor seconds that logging a step takes, all threads together, into a real store at a training's pace."""
    params = load_params(ROOT / "params.yaml").model_dump()
    with tempfile.TemporaryDirectory() as root, start_run("train", params, Path(root), Path(root, "run")) as run:
        while run.queue:  # until MLflow is imported and the store is made
            time.sleep(0.1)
        time.sleep(1)
        began = time.process_time()
        for step in range(1, steps + 1):
            run.metrics(step, {"train/loss": 0.1})
            if step % WINDOW == 0:
                run.metrics(step, {f"train/{name}": 0.1 for name in ("learning_rate", "grad_norm", "images_per_second")})
            time.sleep(pace)
        return (time.process_time() - began) / steps


def report(result: dict) -> str:
    total = sum(result["seconds"].values())
    rows = [[part, f"{1000 * s:.1f}", f"{s / total:.1%}"] for part, s in result["seconds"].items()]
    rows.append(
        [
            "logging to MLflow, on another thread",
            f"{1000 * result['mlflow_seconds']:.2f}",
            f"{result['mlflow_seconds'] / total:.1%}",
        ]
    )
    return (
        table(["a training step", "ms", "of it"], rows)
        + f"\n\nAll but forward and backward: {overhead(result['seconds']):.1%}; with AdamW instead of Muon, "
        f"{overhead(result['adamw_seconds']):.1%}. Medians of {result['steps']} steps."
    )


def overhead(seconds: dict[str, float]) -> float:
    """The share of a step that is neither its forward nor its backward pass."""
    return 1 - (seconds["forward"] + seconds["backward"]) / sum(seconds.values())
