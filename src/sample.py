"""Stage 3, `python src/sample.py`: images from the trained model, as params.yaml's `sample` section says.

Writes output/samples.npz, the grid output/generated_samples.png with a row a class, and output/denoising.{png,gif}. An
interrupted run goes on with the batch that it was at when it is started again.
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
from ddpm.device import enough_memory, select_device
from ddpm.diffusion import Diffusion
from ddpm.figures import save_gif, save_png, sheet
from ddpm.files import file_sha256, read_verified, write_atomic, write_verified
from ddpm.params import Params, SampleParams, UserError, clean_errors, load_params, project_root
from ddpm.resume import fingerprint, imported_source, run_folder
from ddpm.samplers import ImageNoise, generate
from ddpm.unet import UNet

MODEL = Path("models/diffusion_model.pth")
OUTPUT = Path("output")
BATCH = 125  # images denoised together; changes nothing beyond rounding
GRID_COLUMNS = 10
NULL_CLASS = len(CLASSES)
STRIP_COLUMNS, GIF_FRAMES = 11, 41


def main() -> None:
    params = load_params()
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    with enough_memory(device, "close what else uses it"):
        sample(params, device)


def sample(params: Params, device: torch.device) -> None:
    p = params.sample
    model, diffusion, label_dropout = load_model(MODEL, device)
    check_fits(p, diffusion.timesteps, label_dropout)
    classes = {"all": list(range(len(CLASSES))), "none": [NULL_CLASS]}.get(p.classes, p.classes)
    guidance = 1.0 if p.classes == "none" else p.guidance_scale  # towards no class is nowhere
    labels = torch.tensor(classes).repeat(-(-p.count // len(classes)))[: p.count]

    root, checkpoint, required = project_root(), file_sha256(MODEL), params.runtime.require_mlflow
    name = fingerprint(p.model_dump(), [*imported_source(), MODEL])
    with (
        run_folder(root / ".resume" / name) as folder,
        tracking.start_run("sample", params.model_dump(), root, folder, str(device), required, checkpoint) as run,
    ):
        began = time.monotonic()
        images, history, drawn = draw(model, diffusion, labels, p, guidance, device, folder)
        seconds = time.monotonic() - began

        start = ImageNoise(p.seed, 0, len(history[0]), (1, 28, 28), torch.device("cpu"))()  # as the first batch drew it
        write_outputs(images, labels, classes, [to_uint8(start), *history])
        run.metrics(0, {"sample/seconds": seconds, "sample/images_per_second": drawn / seconds})
        for path in ("generated_samples.png", "denoising.png", "denoising.gif"):
            run.artifact(OUTPUT / path)


def draw(
    model: UNet, diffusion: Diffusion, labels: Tensor, p: SampleParams, guidance: float, device: torch.device, folder: Path
) -> tuple[Tensor, list[Tensor], int]:
    """Images uint8 [N, 28, 28] for `labels` [N], what the first few of them were after each step, and how many are newly drawn.

    Every batch is kept in `folder`, so that an interrupted run draws only what it lacks.
    """
    images, history, drawn = torch.empty(len(labels), 28, 28, dtype=torch.uint8), [], 0
    with tqdm(total=len(labels) * p.steps, unit=" steps", unit_scale=True, desc="sample", dynamic_ncols=True) as bar:
        for first, y in zip(range(0, len(labels), BATCH), labels.split(BATCH), strict=True):
            kept = folder / f"images-{first:07d}.pt"
            batch = read_verified(kept)
            if batch is None:
                noise, batch = ImageNoise(p.seed, first, len(y), (1, 28, 28), device), {"history": []}
                for x, _ in generate(
                    model, diffusion, y.to(device), NULL_CLASS, noise,
                    p.sampler, p.steps, p.spacing, p.eta, p.variance, p.clip, guidance,
                ):  # fmt: skip
                    if first == 0:
                        batch["history"].append(to_uint8(x[: len(CLASSES)]).cpu())
                    bar.update(len(y))
                batch["images"] = to_uint8(x).cpu()
                write_verified(kept, batch)
                drawn += len(y)
            bar.update((first + len(y)) * p.steps - bar.n)
            images[first : first + len(y)] = batch["images"]
            history += batch["history"]
    return images, history, drawn


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
