"""Any number of images, batch by batch. An interrupted run keeps its batches, and several processes share them."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.data.pixels import to_uint8
from ddpm.params import SampleParams
from ddpm.runtime.distributed import SINGLE_PROCESS, Group
from ddpm.sampling.pictures import STRIP_ROWS
from ddpm.sampling.pipeline import Pipeline, label_batches
from ddpm.tensor_files import read_verified, write_verified


@dataclass
class Drawn:
    images: Tensor  # uint8 [N, H, H], or [N, H, H, 3] in colour
    labels: Tensor  # int64 [N]
    frames: list[Tensor]  # the first images, uint8: the noise, then what each step makes of it
    newly_drawn: int  # images drawn now, not taken from an interrupted run


def draw_images(pipeline: Pipeline, p: SampleParams, folder: Path, group: Group = SINGLE_PROCESS) -> Drawn | None:
    """Draw `p.count` images; returns None on all ranks but rank 0.

    Each rank draws its share of the batches. A finished batch is kept in `folder`, so that a resumed run draws only the rest.
    """
    batches = label_batches(pipeline.class_ids(p), p.count, pipeline.batch_size)
    mine = group.shard(batches)
    images, frames, newly_drawn = [], [], 0
    steps = sum(len(labels) for _, labels in mine) * p.steps
    hidden = not group.is_main
    # The delay keeps the bar from printing before `with` can end its line.
    with tqdm(total=steps, unit=" steps", unit_scale=True, desc="sample", dynamic_ncols=True, disable=hidden, delay=1e-9) as bar:
        bar.refresh()
        for first, labels in mine:
            kept = folder / f"images-{first:07d}.pt"
            batch = read_verified(kept)
            if batch is None or len(batch["images"]) != len(labels):  # or kept by a device with another batch size
                batch = draw_batch(pipeline, p, first, labels, bar)
                write_verified(kept, batch)
                newly_drawn += len(labels)
            images.append(batch["images"])
            frames += batch["frames"]
            bar.update(sum(map(len, images)) * p.steps - bar.n)
    gathered = group.gather(torch.cat(images) if images else torch.empty(0, dtype=torch.uint8))
    counts = group.gather(torch.tensor([newly_drawn]))
    if gathered is None or counts is None:
        return None
    return Drawn(gathered, torch.cat([labels for _, labels in batches]), frames, int(counts.sum()))


def draw_batch(pipeline: Pipeline, p: SampleParams, first: int, labels: Tensor, bar: tqdm) -> dict:
    """`images`, and in the first batch the `frames` of its first few; both uint8, on the CPU."""
    frames = []
    for step, x in enumerate(pipeline.iter_samples(labels, p, first)):
        if first == 0:
            frames.append(to_uint8(x[:STRIP_ROWS]).cpu())
        bar.update(len(labels) if step else 0)  # the noise before the first step is no work
    return {"images": to_uint8(x).cpu(), "frames": frames}
