"""`make demo`: garments in seconds, from the trained model that comes with the repository.

    python src/demo.py                       # ten of each class
    python src/demo.py Bag sneaker --seed 3  # others, of these classes

Writes output/demo.png, with one row per class, and output/demo.gif, in which the first ten emerge from noise. The sampling
parameters are those of models/pretrained/card.json, with which the model was evaluated, but for fewer steps; not those of
params.yaml.
"""

import argparse
from pathlib import Path

from ddpm.data.pixels import to_uint8
from ddpm.errors import UserError
from ddpm.figures import save_gif, save_png
from ddpm.paths import PRETRAINED
from ddpm.runtime.cli import between, clean_errors
from ddpm.runtime.device import select_device
from ddpm.sampling.pictures import GRID_COLUMNS, animation, grid
from ddpm.sampling.pipeline import Pipeline, label_batches
from ddpm.serving.pretrained import pretrained_sampling
from ddpm.serving.requests import class_numbers

DEMO_GRID, DEMO_ANIMATION = Path("output/demo.png"), Path("output/demo.gif")
ANIMATED = 10  # images
STEPS = 12  # at most, so that a hundred images take less than twenty seconds on two slow cores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("classes", nargs="*", metavar="CLASS", help="by name or number (default: all classes)")
    parser.add_argument("--seed", type=between(0, 2**32 - 1), default=1, help="another seed draws other garments (default: 1)")
    options = parser.parse_args()
    if not PRETRAINED.exists() and not Path("models").is_dir():
        raise UserError(f"{PRETRAINED}: there is no such file here; run from the repository's root")
    pipeline = Pipeline(PRETRAINED, select_device("auto"))
    classes = sorted(set(class_numbers(options.classes, pipeline.classes))) or "all"
    sampling = pretrained_sampling()
    p = sampling.model_copy(update={"classes": classes, "seed": options.seed, "steps": min(STEPS, sampling.steps)})
    ids = pipeline.class_ids(p)
    ((_, labels),) = label_batches(ids, len(ids) * GRID_COLUMNS)  # the classes take turns
    frames = [to_uint8(x).cpu() for x in pipeline.iter_samples(labels, p)]
    save_png(DEMO_GRID, grid(frames[-1], [pipeline.classes[c] for c in ids]))
    save_gif(DEMO_ANIMATION, animation([x[:ANIMATED] for x in frames]))
    print(f"{DEMO_GRID} and {DEMO_ANIMATION}, drawn by {PRETRAINED} with seed {p.seed}")
    print("`make serve` opens a page to draw more")


if __name__ == "__main__":
    with clean_errors():
        main()
