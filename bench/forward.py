"""`python bench/forward.py`: docs/images/forward.png, what the forward process of params.yaml makes of real images.

Prints the timesteps of the columns, which are evenly spaced to the eye: in the logarithm of the signal-to-noise ratio.
"""

import torch

from contenders import ROOT
from ddpm.data.fashion_mnist import CLASSES, load_split
from ddpm.data.pixels import to_model_range, to_uint8
from ddpm.diffusion.process import Diffusion
from ddpm.diffusion.rng import seeded_rng
from ddpm.figures import save_png, sheet
from ddpm.params_file import load_params

SHOWN = (0, 3, 5, 7, 8)  # of the classes
COLUMNS = 11


def main() -> None:
    diffusion = Diffusion(**load_params(ROOT / "params.yaml").train.diffusion.model_dump())
    images, labels = load_split(ROOT / "data/FashionMNIST/raw", "train")
    first = [int((labels == c).nonzero()[0]) for c in SHOWN]
    x0 = to_model_range(images[first])
    eps = torch.randn(x0.shape, generator=seeded_rng(0, "forward", 0))
    half_log_snr = (diffusion.alpha / diffusion.sigma).log()
    timesteps = [int((half_log_snr - wanted).abs().argmin()) for wanted in torch.linspace(3, -2, COLUMNS)]
    columns = [to_uint8(diffusion.q_sample(x0, torch.full((len(x0),), t), eps)) for t in timesteps]
    picture = sheet(torch.stack(columns, dim=1).flatten(0, 1), COLUMNS, [CLASSES[c] for c in SHOWN])
    save_png(ROOT / "docs/images/forward.png", picture)
    print("t =", *timesteps)


if __name__ == "__main__":
    main()
