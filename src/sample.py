"""Stage 3, `python src/sample.py`: images from the trained model, as params.yaml's `sample` section says.

Writes output/samples.npz, the grid output/generated_samples.png with a row a class, and output/denoising.{png,gif}. An
interrupted run goes on with the batch that it was at when it is started again. By hand, `python src/sample.py FILE` draws from
another model, such as models/pretrained/fashion_ddpm.pth.
"""

import argparse
import io
import time
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm import tracking
from ddpm.checkpoint import MODEL
from ddpm.data import to_uint8
from ddpm.device import enough_memory, select_device
from ddpm.distributed import ALONE, Group
from ddpm.figures import save_gif, save_png, sheet
from ddpm.files import file_sha256, read_verified, write_atomic, write_verified
from ddpm.generation import Generator, batches
from ddpm.params import Params, SampleParams, UserError, clean_errors, load_params, project_root
from ddpm.resume import fingerprint, imported_source
from ddpm.samplers import ImageNoise
from ddpm.stage import perform

OUTPUT = Path("output")
GRID_COLUMNS = 10
STRIP_ROWS, STRIP_COLUMNS, GIF_FRAMES = 10, 11, 41


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "model", nargs="?", type=Path, default=MODEL, help=f"a file of the kind of {MODEL}, which it is by default"
    )
    file, params = parser.parse_args().model, load_params()
    p = params.sample
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    with enough_memory(device, "close what else uses it"):
        generator = Generator(file, device)
        try:
            generator.check(p)
        except UserError as error:
            raise UserError(f"params.yaml: {error}") from None
        checkpoint, name = file_sha256(file), fingerprint(p.model_dump(), [*imported_source(), file])

        def work(group: Group, folder: Path) -> None:
            if group.first:
                track_sampling(params, generator, checkpoint, folder, group)
            else:
                draw(generator, p, folder, group)

        perform(work, name, params.runtime.processes, device)


def track_sampling(params: Params, generator: Generator, checkpoint: str, folder: Path, group: Group) -> None:
    """Draw the images, write the outputs, and log it all as one MLflow run."""
    p, root, required, where = params.sample, project_root(), params.runtime.require_mlflow, str(generator.device)
    ours = MODEL.exists() and file_sha256(MODEL) == checkpoint
    told = params.model_dump(exclude=None if ours else {"train"})  # which is not of another model
    with tracking.start_run("sample", told, root, folder, where, required, checkpoint) as run:
        began = time.monotonic()
        images, history, drawn = draw(generator, p, folder, group)
        seconds = time.monotonic() - began
        start = ImageNoise(p.seed, 0, len(history[0]), generator.image_shape, torch.device("cpu"))()  # as the first batch drew it
        write_outputs(images, [to_uint8(start), *history], generator, p, checkpoint)
        run.metrics(0, {"sample/seconds": seconds, "sample/images_per_second": drawn / seconds})
        for path in ("generated_samples.png", "denoising.png", "denoising.gif"):
            run.artifact(OUTPUT / path)
        print(f"{len(images):,} images are in {OUTPUT / 'samples.npz'}, the first of them in {OUTPUT / 'generated_samples.png'}")


def draw(generator: Generator, p: SampleParams, folder: Path, group: Group = ALONE) -> tuple[Tensor, list[Tensor], int] | None:
    """All images uint8 [N, …], what the first few of them were after each step, and how many of them are newly drawn.

    Every process of `group` draws its share of the batches; only the first gets the images, the others None. A batch that is
    drawn is kept in `folder`, so that an interrupted run draws only what it lacks.
    """
    mine = group.share(batches(generator.class_ids(p), p.count, generator.batch_size))
    images, history, drawn = [], [], 0
    total = sum(len(labels) for _, labels in mine) * p.steps
    options = {"unit": " steps", "unit_scale": True, "desc": "sample", "dynamic_ncols": True, "disable": not group.first}
    with tqdm(total=total, delay=1e-9, **options) as bar:  # not drawn before `with` can end its line
        bar.refresh()
        for first, labels in mine:
            kept = folder / f"images-{first:07d}.pt"
            batch = read_verified(kept)
            if batch is None or len(batch["images"]) != len(labels):  # or kept by another device
                batch = {"history": []}
                for x in generator.walk(labels, p, first):
                    if first == 0:
                        batch["history"].append(to_uint8(x[:STRIP_ROWS]).cpu())
                    bar.update(len(labels))
                batch["images"] = to_uint8(x).cpu()
                write_verified(kept, batch)
                drawn += len(labels)
            images.append(batch["images"])
            history += batch["history"]
            bar.update(sum(map(len, images)) * p.steps - bar.n)
    gathered = group.gather(torch.cat(images) if images else torch.empty(0, dtype=torch.uint8))
    drawn = group.gather(torch.tensor([drawn]))
    return (gathered, history, drawn.sum().item()) if group.first else None


def write_outputs(images: Tensor, history: list[Tensor], generator: Generator, p: SampleParams, checkpoint: str) -> None:
    """`history`: the first images, uint8 [n, …], before the first network evaluation and after each."""
    classes = generator.class_ids(p)
    labels = torch.cat([labels for _, labels in batches(classes, p.count)])
    write_samples(OUTPUT / "samples.npz", images, labels.masked_fill(labels == generator.null_class, -1), checkpoint)

    named = generator.null_class not in classes
    save_png(
        OUTPUT / "generated_samples.png",
        row_a_class(images, generator, classes) if named else sheet(images[: GRID_COLUMNS * GRID_COLUMNS], GRID_COLUMNS),
    )
    shown = evenly(history, STRIP_COLUMNS)
    names = [generator.classes[c] for c in (classes * STRIP_ROWS)[: len(history[0])]] if named else []
    save_png(OUTPUT / "denoising.png", sheet(torch.stack(shown, dim=1).flatten(0, 1), len(shown), names))
    save_gif(OUTPUT / "denoising.gif", [sheet(x, columns=5) for x in evenly(history, GIF_FRAMES)])


def write_samples(path: Path, images: Tensor, labels: Tensor, checkpoint: str) -> None:
    """The archive of images uint8 [N, …] and labels int64 [N], which says by its SHA-256 which `checkpoint` drew them."""
    archive = io.BytesIO()
    np.savez_compressed(archive, images=images.numpy(), labels=labels.numpy(), checkpoint_sha256=checkpoint)
    write_atomic(path, archive.getvalue())


def row_a_class(images: Tensor, generator: Generator, classes: list[int]) -> Tensor:
    """A sheet of the first of these images, uint8 [N, …], which are of these classes in turn."""
    columns = min(GRID_COLUMNS, len(images) // len(classes))
    rows = [images[i :: len(classes)][:columns] for i in range(len(classes))]
    return sheet(torch.cat(rows), columns, [generator.classes[c] for c in classes])


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
