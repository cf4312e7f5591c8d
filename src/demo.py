"""`make demo`: garments in seconds, from the trained model that comes with the repository.

    python src/demo.py                       # ten of every class
    python src/demo.py Bag sneaker --seed 3  # other ones, of these classes

Writes output/demo.png, with a row a class, and output/demo.gif, in which the first of each class emerge from noise. They are
drawn in the way that models/pretrained/card.json says the model was judged by; params.yaml has no part in it.
"""

import argparse
from pathlib import Path

import torch

from ddpm.data import to_uint8
from ddpm.device import select_device
from ddpm.figures import save_gif, save_png, sheet
from ddpm.generation import Generator, batches
from ddpm.params import UserError, between, clean_errors
from ddpm.pretrained import MODEL, sampling
from ddpm.samplers import ImageNoise
from ddpm.serving import class_numbers
from sample import GIF_FRAMES, GRID_COLUMNS, evenly, row_a_class

GRID, ANIMATION = Path("output/demo.png"), Path("output/demo.gif")
ANIMATED = 10  # garments


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="by name or number; all of them where none is given")
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=1, help="other garments (1)")
    options = parser.parse_args()
    if not MODEL.exists() and not Path("models").is_dir():
        raise UserError(f"{MODEL}: there is no such file here; run from the repository's root")
    generator = Generator(MODEL, select_device("auto"))
    classes = sorted(set(class_numbers(options.classes, generator.classes))) or "all"
    p = sampling().model_copy(update={"classes": classes, "seed": options.seed})
    ids = generator.class_ids(p)
    ((_, labels),) = batches(ids, len(ids) * GRID_COLUMNS)  # by turns
    history = [ImageNoise(p.seed, 0, len(labels), generator.image_shape, torch.device("cpu"))(), *generator.walk(labels, p)]
    frames = [to_uint8(x).cpu() for x in history]
    save_png(GRID, row_a_class(frames[-1], generator, ids))
    save_gif(ANIMATION, [sheet(x[:ANIMATED], columns=5) for x in evenly(frames, GIF_FRAMES)])
    print(f"{GRID} and {ANIMATION}, by {MODEL} with seed {p.seed}")


if __name__ == "__main__":
    with clean_errors():
        main()
