"""Pictures of samples: the grid, images emerging from noise step by step, and the same as an animation."""

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from ddpm.figures import sheet

GRID_COLUMNS = 10
STRIP_ROWS, STRIP_COLUMNS, GIF_FRAMES = 10, 11, 41


def grid(images: Tensor, class_names: Sequence[str] = ()) -> Image:
    """A sheet of the first images uint8 [N, …]: one row per class if the images are of these classes in turn."""
    if not class_names:
        return sheet(images[: GRID_COLUMNS * GRID_COLUMNS], GRID_COLUMNS)
    columns = min(GRID_COLUMNS, len(images) // len(class_names))
    rows = [images[i :: len(class_names)][:columns] for i in range(len(class_names))]
    return sheet(torch.cat(rows), columns, class_names)


def strip(frames: list[Tensor], class_names: Sequence[str] = ()) -> Image:
    """One row per image: what it was at some of the steps, from noise on the left to the sample on the right."""
    shown = evenly_spaced(frames, STRIP_COLUMNS)
    names = (list(class_names) * STRIP_ROWS)[: len(frames[0])]
    return sheet(torch.stack(shown, dim=1).flatten(0, 1), len(shown), names)


def animation(frames: list[Tensor]) -> list[Image]:
    """The frames of an animation in which the images emerge from noise, five in a row."""
    return [sheet(x, columns=5) for x in evenly_spaced(frames, GIF_FRAMES)]


def evenly_spaced(frames: list[Tensor], count: int) -> list[Tensor]:
    """About `count` of the frames, evenly spaced to the eye: by the distance of their pixels from those of the last frame."""
    if len(frames) <= count:
        return frames
    distance = torch.stack([(x.float() - frames[-1].float()).abs().mean() for x in frames])
    chosen = {int((distance - wanted).abs().argmin()) for wanted in torch.linspace(distance[0].item(), 0, count)}
    return [frames[i] for i in sorted(chosen | {0, len(frames) - 1})]
