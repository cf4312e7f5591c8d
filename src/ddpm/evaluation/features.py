"""Features of images by the frozen classifier, and a cache of those of the real images."""

import hashlib
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm.evaluation.classifier import FEATURES, Classifier
from ddpm.runtime.distributed import SINGLE_PROCESS, Group
from ddpm.tensor_files import read_verified, write_verified


class Extracted(NamedTuple):
    features: Tensor  # float32 [N, FEATURES], on the CPU
    predictions: Tensor  # int64 [N], classes


PIXELS_AT_ONCE = 200_000  # in one batch; larger batches need more memory and aren't faster
EMPTY = Extracted(torch.empty(0, FEATURES), torch.empty(0, dtype=torch.int64))


@torch.inference_mode()
def extract(
    classifier: Classifier, images: Tensor, device: torch.device, batch_size: int | None = None, group: Group = SINGLE_PROCESS
) -> Extracted:
    """Features and predicted classes of uint8 images [N, …]. Each rank computes its share; all but rank 0 get EMPTY."""
    classifier = classifier.to(device).to(memory_format=torch.channels_last)
    mine = group.shard(images.split(batch_size or min(250, max(1, PIXELS_AT_ONCE // images.shape[1] ** 2))))
    features, predictions = [EMPTY.features], [EMPTY.predictions]
    what, hidden = f"features of {len(images)}", not group.is_main
    # The delay keeps the bar from printing before `with` can end its line.
    with tqdm(mine, unit="batch", desc=what, dynamic_ncols=True, disable=hidden, delay=1e-9) as bar:
        for batch in bar:
            f, logits = classifier(batch.to(device))
            features.append(f.float().cpu())
            predictions.append(logits.argmax(1).cpu())
    all_features, all_predictions = group.gather(torch.cat(features)), group.gather(torch.cat(predictions))
    return EMPTY if all_features is None or all_predictions is None else Extracted(all_features, all_predictions)


def extract_cached(
    classifier: Classifier, images: Tensor, device: torch.device, cache: Path, group: Group = SINGLE_PROCESS
) -> Extracted:
    """`extract`, with the result kept in the folder `cache`: real images are the same in every evaluation."""
    digest = hashlib.sha256()
    for rows in images.split(10_000):
        digest.update(rows.numpy().tobytes())
    for weight in classifier.state_dict().values():
        digest.update(weight.cpu().numpy().tobytes())
    digest.update(f"{torch.__version__} {device} {torch.get_num_threads()}".encode())  # rounding depends on these
    path = cache / f"features-{digest.hexdigest()[:16]}.pt"
    content = read_verified(path) if group.is_main else None
    if not group.broadcast(content is None):
        return Extracted(**content) if content else EMPTY
    extracted = extract(classifier, images, device, group=group)
    if group.is_main:
        write_verified(path, extracted._asdict())
    return extracted
