""""""

import torch
from torch import Tensor

from ddpm.figures import sheet
from ddpm.sampling.pipeline import Pipeline

GRID_COLUMNS = 10
STRIP_ROWS, STRIP_COLUMNS, GIF_FRAMES = 10, 11, 41


def class_rows(images: Tensor, pipeline: Pipeline, classes: list[int]) -> Tensor:
    """A sheet of the first of these images, uint8 [N, …], which are of these classes in turn."""
    columns = min(GRID_COLUMNS, len(images) // len(classes))
    rows = [images[i :: len(classes)][:columns] for i in range(len(classes))]
    return sheet(torch.cat(rows), columns, [pipeline.classes[c] for c in classes])


def evenly_spaced(frames: list[Tensor], count: int) -> list[Tensor]:
    """Some `count` of the frames, evenly spaced to the eye: in what still separates their pixels from the last one's."""
    if len(frames) <= count:
        return frames
    distance = torch.stack([(x.float() - frames[-1].float()).abs().mean() for x in frames])
    chosen = {(distance - wanted).abs().argmin().item() for wanted in torch.linspace(distance[0].item(), 0, count)}
    return [frames[i] for i in sorted(chosen | {0, len(frames) - 1})]
