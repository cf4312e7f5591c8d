""""""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.evaluation.classifier import FEATURES, Classifier
from ddpm.files import read_verified, write_verified
from ddpm.runtime.distributed import SINGLE_PROCESS, Group


@torch.inference_mode()
def extract(
    classifier: Classifier, images: Tensor, device: torch.device, batch_size: int = 500, group: Group = SINGLE_PROCESS
) -> tuple[Tensor, Tensor]:
    """Features float32 [N, 128] and predicted classes int64 [N] of uint8 images [N, …], on the CPU.

    Every process of `group` computes its share of the batches; only the first gets the whole.
    """
    classifier = classifier.to(device, memory_format=torch.channels_last)
    mine = group.shard(images.split(batch_size))
    features, predictions = [torch.empty(0, FEATURES)], [torch.empty(0, dtype=torch.int64)]
    options = {"unit": "batch", "desc": f"features of {len(images)}", "dynamic_ncols": True, "disable": not group.is_main}
    with tqdm(mine, delay=1e-9, **options) as bar:  # not drawn before `with` can end its line
        for batch in bar:
            f, logits = classifier(batch.to(device))
            features.append(f.float().cpu())
            predictions.append(logits.argmax(1).cpu())
    return group.gather(torch.cat(features)), group.gather(torch.cat(predictions))


def extract_cached(
    classifier: Classifier, images: Tensor, device: torch.device, cache: Path, group: Group = SINGLE_PROCESS
) -> tuple[Tensor, Tensor]:
    """`extract`, kept in the folder `cache` for the next time: the real images are the same at every evaluation."""
    digest = hashlib.sha256()
    for rows in images.split(10_000):
        digest.update(rows.numpy().tobytes())
    for weight in classifier.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    digest.update(f"{torch.__version__} {device} {torch.get_num_threads()}".encode())  # what rounding depends on
    path = cache / f"features-{digest.hexdigest()[:16]}.pt"
    content = read_verified(path) if group.is_main else None
    if group.broadcast(content is None):
        features, predictions = extract(classifier, images, device, group=group)
        content = {"features": features, "predictions": predictions}
        if group.is_main:
            write_verified(path, content)
    return (content["features"], content["predictions"]) if group.is_main else (None, None)
