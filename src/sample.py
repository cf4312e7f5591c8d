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
from ddpm.data import CLASSES, to_uint8
from ddpm.device import enough_memory, select_device
from ddpm.figures import save_gif, save_png, sheet
from ddpm.files import file_sha256, read_verified, write_atomic, write_verified
from ddpm.generation import BATCH, NULL_CLASS, Generator, class_ids, class_labels
from ddpm.params import Params, SampleParams, UserError, clean_errors, load_params, project_root
from ddpm.resume import fingerprint, imported_source, run_folder
from ddpm.samplers import ImageNoise

MODEL = Path("models/diffusion_model.pth")
OUTPUT = Path("output")
GRID_COLUMNS = 10
STRIP_COLUMNS, GIF_FRAMES = 11, 41


def main() -> None:
    params = load_params()
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    with enough_memory(device, "close what else uses it"):
        sample(params, device)


def sample(params: Params, device: torch.device) -> None:
    p = params.sample
    generator = Generator(MODEL, device)
    try:
        generator.check(p)
    except UserError as error:
        raise UserError(f"params.yaml: {error}") from None
    classes = class_ids(p)
    labels = class_labels(classes, p.count)

    root, checkpoint, required = project_root(), file_sha256(MODEL), params.runtime.require_mlflow
    name = fingerprint(p.model_dump(), [*imported_source(), MODEL])
    with (
        run_folder(root / ".resume" / name) as folder,
        tracking.start_run("sample", params.model_dump(), root, folder, str(device), required, checkpoint) as run,
    ):
        began = time.monotonic()
        images, history, drawn = draw(generator, labels, p, folder)
        seconds = time.monotonic() - began

        start = ImageNoise(p.seed, 0, len(history[0]), (1, 28, 28), torch.device("cpu"))()  # as the first batch drew it
        write_outputs(images, labels, classes, [to_uint8(start), *history])
        run.metrics(0, {"sample/seconds": seconds, "sample/images_per_second": drawn / seconds})
        for path in ("generated_samples.png", "denoising.png", "denoising.gif"):
            run.artifact(OUTPUT / path)


def draw(generator: Generator, labels: Tensor, p: SampleParams, folder: Path) -> tuple[Tensor, list[Tensor], int]:
    """Images uint8 [N, 28, 28] for `labels` [N], what the first few of them were after each step, and how many are newly drawn.

    Every batch is kept in `folder`, so that an interrupted run draws only what it lacks.
    """
    images, history, drawn = torch.empty(len(labels), 28, 28, dtype=torch.uint8), [], 0
    with tqdm(total=len(labels) * p.steps, unit=" steps", unit_scale=True, desc="sample", dynamic_ncols=True) as bar:
        for first, y in zip(range(0, len(labels), BATCH), labels.split(BATCH), strict=True):
            kept = folder / f"images-{first:07d}.pt"
            batch = read_verified(kept)
            if batch is None:
                batch = {"history": []}
                for x in generator.walk(y, p, first):
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


def evenly(frames: list[Tensor], count: int) -> list[Tensor]:
    """Some `count` of the frames, evenly spaced to the eye: in what still separates their pixels from the last one's."""
    if len(frames) <= count:
        return frames
    distance = torch.stack([(x.float() - frames[-1].float()).abs().mean() for x in frames])
    chosen = {(distance - wanted).abs().argmin().item() for wanted in torch.linspace(distance[0].item(), 0, count)}
    return [frames[i] for i in sorted(chosen | {0, len(frames) - 1})]


if __name__ == "__main__":
    with clean_errors():
        main()
