""""""

from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.data.pixels import to_uint8
from ddpm.files import read_verified, write_verified
from ddpm.params import SampleParams
from ddpm.runtime.distributed import SINGLE_PROCESS, Group
from ddpm.sampling.pictures import STRIP_ROWS
from ddpm.sampling.pipeline import Pipeline, label_batches


def draw_images(
    pipeline: Pipeline, p: SampleParams, folder: Path, group: Group = SINGLE_PROCESS
) -> tuple[Tensor, list[Tensor], int] | None:
    """All images uint8 [N, …], what the first few of them were after each step, and how many of them are newly drawn.

    Every process of `group` draws its share of the batches; only the first gets the images, the others None. A batch that is
    drawn is kept in `folder`, so that an interrupted run draws only what it lacks.
    """
    mine = group.shard(label_batches(pipeline.class_ids(p), p.count, pipeline.batch_size))
    images, history, drawn = [], [], 0
    total = sum(len(labels) for _, labels in mine) * p.steps
    options = {"unit": " steps", "unit_scale": True, "desc": "sample", "dynamic_ncols": True, "disable": not group.is_main}
    with tqdm(total=total, delay=1e-9, **options) as bar:  # not drawn before `with` can end its line
        bar.refresh()
        for first, labels in mine:
            kept = folder / f"images-{first:07d}.pt"
            batch = read_verified(kept)
            if batch is None or len(batch["images"]) != len(labels):  # or kept by another device
                batch = {"history": []}
                for x in pipeline.iter_samples(labels, p, first):
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
    return (gathered, history, drawn.sum().item()) if group.is_main else None
