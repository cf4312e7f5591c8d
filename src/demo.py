"""`make demo`: garments in seconds, from the trained model that comes with the repository.

    python src/demo.py                       # ten of every class
    python src/demo.py Bag sneaker --seed 3  # other ones, of these classes

Writes output/demo.png, with a row a class, and output/demo.gif, in which the first of each class emerge from noise. They are
drawn in the way that models/pretrained/card.json says the model was judged by; params.yaml has no part in it.
"""

import argparse
from pathlib import Path

import torch

from ddpm.data.pixels import to_uint8
from ddpm.diffusion.rng import ImageNoise
from ddpm.errors import UserError
from ddpm.figures import save_gif, save_png, sheet
from ddpm.paths import PRETRAINED
from ddpm.runtime.cli import between, clean_errors
from ddpm.runtime.device import select_device
from ddpm.sampling.pictures import GIF_FRAMES, GRID_COLUMNS, class_rows, evenly_spaced
from ddpm.sampling.pipeline import Pipeline, label_batches
from ddpm.serving.pretrained import pretrained_sampling
from ddpm.serving.requests import class_numbers

GRID, ANIMATION = Path("output/demo.png"), Path("output/demo.gif")
ANIMATED = 10  # garments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="by name or number; all of them where none is given")
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=1, help="other garments (1)")
    options = parser.parse_args()
    if not PRETRAINED.exists() and not Path("models").is_dir():
        raise UserError(f"{PRETRAINED}: there is no such file here; run from the repository's root")
    pipeline = Pipeline(PRETRAINED, select_device("auto"))
    classes = sorted(set(class_numbers(options.classes, pipeline.classes))) or "all"
    p = pretrained_sampling().model_copy(update={"classes": classes, "seed": options.seed})
    ids = pipeline.class_ids(p)
    ((_, labels),) = label_batches(ids, len(ids) * GRID_COLUMNS)  # by turns
    history = [ImageNoise(p.seed, 0, len(labels), pipeline.image_shape, torch.device("cpu"))(), *pipeline.iter_samples(labels, p)]
    frames = [to_uint8(x).cpu() for x in history]
    save_png(GRID, class_rows(frames[-1], pipeline, ids))
    save_gif(ANIMATION, [sheet(x[:ANIMATED], columns=5) for x in evenly_spaced(frames, GIF_FRAMES)])
    print(f"{GRID} and {ANIMATION}, by {PRETRAINED} with seed {p.seed}")


if __name__ == "__main__":
    with clean_errors():
        main()
