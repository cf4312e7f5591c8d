"""Stage 3, `python src/sample.py`: draw images from the trained model, as the `sample` section of params.yaml says.

Writes output/samples.npz, the grid output/generated_samples.png with one row per class, and output/denoising.{png,gif}. An
interrupted run resumes with the batch that it was drawing when it is started again. By hand, `python src/sample.py FILE` draws
from another model, such as models/pretrained/fashion_ddpm.pth.
"""

import argparse
import time
from pathlib import Path

from ddpm.data.samples_file import Samples, write_samples
from ddpm.errors import UserError
from ddpm.figures import save_gif, save_png
from ddpm.files import file_sha256
from ddpm.params import SampleParams
from ddpm.params_file import load_params
from ddpm.paths import ANIMATION, GRID, MODEL, SAMPLES, STRIP
from ddpm.runtime.cli import clean_errors
from ddpm.runtime.device import enough_memory, select_device
from ddpm.runtime.distributed import Group
from ddpm.runtime.run_folder import fingerprint, imported_source
from ddpm.sampling.batches import Drawn, draw_images
from ddpm.sampling.pictures import animation, grid, strip
from ddpm.sampling.pipeline import Pipeline
from ddpm.stage import run_stage
from ddpm.tracking.run import Run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("model", nargs="?", type=Path, default=MODEL, help=f"model checkpoint (default: {MODEL})")
    file, params = parser.parse_args().model, load_params()
    p = params.sample
    device = select_device(params.runtime.device, deterministic=params.runtime.deterministic)
    with enough_memory(device, "close other programs that use this device"):
        pipeline = Pipeline(file, device)
        try:
            pipeline.check(p)
        except UserError as error:
            raise UserError(f"params.yaml: {error}") from None
        checkpoint_sha256 = file_sha256(file)

        def work(group: Group, folder: Path, run: Run | None) -> str:
            began = time.monotonic()
            drawn = draw_images(pipeline, p, folder, group)
            if run is None or drawn is None:
                return ""
            seconds = time.monotonic() - began
            write_outputs(drawn, pipeline, p, checkpoint_sha256)
            run.metrics(0, {"sample/seconds": seconds, "sample/images_per_second": drawn.newly_drawn / seconds})
            for path in (GRID, STRIP, ANIMATION):
                run.artifact(path)
            return f"{len(drawn.images):,} images in {SAMPLES}, the first of them as a grid in {GRID}"

        name = fingerprint(p.model_dump(), [*imported_source(), file])
        trained_here = MODEL.exists() and file_sha256(MODEL) == checkpoint_sha256
        run_stage("sample", params, device, name, work, checkpoint_sha256, trained_here)


def write_outputs(drawn: Drawn, pipeline: Pipeline, p: SampleParams, checkpoint_sha256: str) -> None:
    labels = drawn.labels.masked_fill(drawn.labels == pipeline.null_class, -1)
    write_samples(SAMPLES, Samples(drawn.images, labels, checkpoint_sha256))
    classes = pipeline.class_ids(p)
    names = [] if pipeline.null_class in classes else [pipeline.classes[c] for c in classes]
    save_png(GRID, grid(drawn.images, names))
    save_png(STRIP, strip(drawn.frames, names))
    save_gif(ANIMATION, animation(drawn.frames))


if __name__ == "__main__":
    with clean_errors():
        main()
