"""Stage 3, `python src/sample.py`: images from the trained model, as params.yaml's `sample` section says.

Writes output/samples.npz, the grid output/generated_samples.png with a row a class, and output/denoising.{png,gif}.
"""

import io
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import tracking
from ddpm.checkpoint import load_model
from ddpm.data import CLASSES, to_uint8
from ddpm.device import select_device
from ddpm.figures import save_gif, save_png, sheet
from ddpm.files import file_sha256, write_atomic
from ddpm.params import SampleParams, UserError, clean_errors, load_params, project_root
from ddpm.samplers import ImageNoise, generate

MODEL = Path("models/diffusion_model.pth")
OUTPUT = Path("output")
BATCH = 125  # images denoised together; changes nothing beyond rounding
GRID_COLUMNS = 10
NULL_CLASS = len(CLASSES)
STRIP_COLUMNS, GIF_FRAMES = 11, 41


def main() -> None:
    params = load_params()
    p = params.sample
    device = select_device(params.runtime.device)
    model, diffusion, label_dropout = load_model(MODEL, device)
    check_fits(p, diffusion.timesteps, label_dropout)
    classes = {"all": list(range(len(CLASSES))), "none": [NULL_CLASS]}.get(p.classes, p.classes)
    guidance = 1.0 if p.classes == "none" else p.guidance_scale  # towards no class is nowhere
    labels = torch.tensor(classes).repeat(-(-p.count // len(classes)))[: p.count]

    with tracking.start_run(
        "sample", params.model_dump(), project_root(), checkpoint_sha256=file_sha256(MODEL), device=str(device)
    ) as run:
        began = time.monotonic()
        images, history = torch.empty(p.count, 28, 28, dtype=torch.uint8), []
        with tqdm(total=p.count * p.steps, unit=" steps", unit_scale=True, desc="sample", dynamic_ncols=True) as bar:
            for first in range(0, p.count, BATCH):
                y = labels[first : first + BATCH].to(device)
                noise = ImageNoise(p.seed, first, len(y), (1, 28, 28), device)
                for x, _ in generate(
                    model, diffusion, y, NULL_CLASS, noise,
                    p.sampler, p.steps, p.spacing, p.eta, p.variance, p.clip, guidance,
                ):  # fmt: skip
                    if first == 0:
                        history.append(to_uint8(x[: len(CLASSES)]).cpu())
                    bar.update(len(y))
                images[first : first + len(y)] = to_uint8(x)
        seconds = time.monotonic() - began

        start = ImageNoise(p.seed, 0, len(history[0]), (1, 28, 28), torch.device("cpu"))()  # as the first batch drew it
        write_outputs(images, labels, classes, [to_uint8(start), *history])
        run.metrics(0, {"sample/seconds": seconds, "sample/images_per_second": p.count / seconds})
        for path in ("generated_samples.png", "denoising.png", "denoising.gif"):
            run.artifact(OUTPUT / path)


def check_fits(p: SampleParams, timesteps: int, label_dropout: float) -> None:
    """Raise UserError where the section `sample` asks of this model what it can't do."""
    if p.steps > timesteps:
        raise UserError(f"params.yaml: sample.steps: {p.steps}, but {MODEL} has {timesteps} timesteps; use at most as many")
    if label_dropout == 1 and p.classes != "none":
        raise UserError(f"params.yaml: sample.classes: {MODEL} was trained without classes; set it to none")
    if label_dropout == 0 and (p.classes == "none" or p.guidance_scale != 1):
        raise UserError(
            f"params.yaml: {MODEL} never trained without classes: sample.guidance_scale must be 1, and classes not none"
        )


def write_outputs(images: Tensor, labels: Tensor, classes: list[int], history: list[Tensor]) -> None:
    """`history`: the first images, uint8 [n, 28, 28], before the first network evaluation and after each."""
    archive = io.BytesIO()
    stored = labels.masked_fill(labels == NULL_CLASS, -1)
    np.savez_compressed(archive, images=images.numpy(), labels=stored.numpy())
    write_atomic(OUTPUT / "samples.npz", archive.getvalue())

    if NULL_CLASS in classes:
        grid = sheet(images[: GRID_COLUMNS * GRID_COLUMNS], GRID_COLUMNS)
    else:
        columns = min(GRID_COLUMNS, len(images) // len(classes))
        rows = [images[i :: len(classes)][:columns] for i in range(len(classes))]
        grid = sheet(torch.cat(rows), columns, [CLASSES[c] for c in classes])
    save_png(OUTPUT / "generated_samples.png", grid)

    shown = evenly(history, STRIP_COLUMNS)
    names = [] if NULL_CLASS in classes else [CLASSES[c] for c in (classes * len(CLASSES))[: len(history[0])]]
    save_png(OUTPUT / "denoising.png", sheet(torch.stack(shown, dim=1).flatten(0, 1), len(shown), names))
    save_gif(OUTPUT / "denoising.gif", [sheet(x, columns=5) for x in evenly(history, GIF_FRAMES)])


def evenly(items: list, count: int) -> list:
    """At most `count` of `items`, evenly spaced, the first and the last among them."""
    count = min(count, len(items))
    return [items[round(i * (len(items) - 1) / (count - 1))] for i in range(count)]


if __name__ == "__main__":
    with clean_errors():
        main()
