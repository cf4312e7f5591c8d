"""Stage 3, `python src/sample.py`: images from the trained model, as params.yaml's `sample` section says.

Writes output/samples.npz, the grid output/generated_samples.png with a row a class, and output/denoising.{png,gif}. An
interrupted run goes on with the batch that it was at when it is started again. By hand, `python src/sample.py FILE` draws from
another model, such as models/pretrained/fashion_ddpm.pth.
"""

import argparse
import time
from pathlib import Path

import torch
from torch import Tensor

from ddpm.data.archive import write_samples
from ddpm.data.pixels import to_uint8
from ddpm.diffusion.rng import ImageNoise
from ddpm.errors import UserError
from ddpm.figures import save_gif, save_png, sheet
from ddpm.files import file_sha256
from ddpm.params import Params, SampleParams
from ddpm.params_file import load_params
from ddpm.paths import MODEL, OUTPUT, project_root
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import enough_memory, select_device
from ddpm.runtime.distributed import Group
from ddpm.runtime.run_folder import fingerprint, imported_source
from ddpm.sampling.drawing import draw_images
from ddpm.sampling.pictures import GIF_FRAMES, GRID_COLUMNS, STRIP_COLUMNS, STRIP_ROWS, class_rows, evenly_spaced
from ddpm.sampling.pipeline import Pipeline, label_batches
from ddpm.stage import run_stage
from ddpm.tracking.run import start_run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument(
        "model", nargs="?", type=Path, default=MODEL, help=f"a file of the kind of {MODEL}, which it is by default"
    )
    file, params = parser.parse_args().model, load_params()
    p = params.sample
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    with enough_memory(device, "close what else uses it"):
        pipeline = Pipeline(file, device)
        try:
            pipeline.check(p)
        except UserError as error:
            raise UserError(f"params.yaml: {error}") from None
        checkpoint, name = file_sha256(file), fingerprint(p.model_dump(), [*imported_source(), file])

        def work(group: Group, folder: Path) -> None:
            if group.is_main:
                track_sampling(params, pipeline, checkpoint, folder, group)
            else:
                draw_images(pipeline, p, folder, group)

        run_stage(work, name, params.runtime.processes, device)


def track_sampling(params: Params, pipeline: Pipeline, checkpoint: str, folder: Path, group: Group) -> None:
    """Draw the images, write the outputs, and log it all as one MLflow run."""
    p, root, required, where = params.sample, project_root(), params.runtime.require_mlflow, str(pipeline.device)
    ours = MODEL.exists() and file_sha256(MODEL) == checkpoint
    told = params.model_dump(exclude=None if ours else {"train"})  # which is not of another model
    with start_run("sample", told, root, folder, where, required, checkpoint) as run:
        began = time.monotonic()
        images, history, drawn = draw_images(pipeline, p, folder, group)
        seconds = time.monotonic() - began
        start = ImageNoise(p.seed, 0, len(history[0]), pipeline.image_shape, torch.device("cpu"))()  # as the first batch drew it
        write_outputs(images, [to_uint8(start), *history], pipeline, p, checkpoint)
        run.metrics(0, {"sample/seconds": seconds, "sample/images_per_second": drawn / seconds})
        for path in ("generated_samples.png", "denoising.png", "denoising.gif"):
            run.artifact(OUTPUT / path)
        print(f"{len(images):,} images are in {OUTPUT / 'samples.npz'}, the first of them in {OUTPUT / 'generated_samples.png'}")


def write_outputs(images: Tensor, history: list[Tensor], pipeline: Pipeline, p: SampleParams, checkpoint: str) -> None:
    """`history`: the first images, uint8 [n, …], before the first network evaluation and after each."""
    classes = pipeline.class_ids(p)
    labels = torch.cat([labels for _, labels in label_batches(classes, p.count)])
    write_samples(OUTPUT / "samples.npz", images, labels.masked_fill(labels == pipeline.null_class, -1), checkpoint)

    named = pipeline.null_class not in classes
    save_png(
        OUTPUT / "generated_samples.png",
        class_rows(images, pipeline, classes) if named else sheet(images[: GRID_COLUMNS * GRID_COLUMNS], GRID_COLUMNS),
    )
    shown = evenly_spaced(history, STRIP_COLUMNS)
    names = [pipeline.classes[c] for c in (classes * STRIP_ROWS)[: len(history[0])]] if named else []
    save_png(OUTPUT / "denoising.png", sheet(torch.stack(shown, dim=1).flatten(0, 1), len(shown), names))
    save_gif(OUTPUT / "denoising.gif", [sheet(x, columns=5) for x in evenly_spaced(history, GIF_FRAMES)])


if __name__ == "__main__":
    with clean_errors():
        main()
