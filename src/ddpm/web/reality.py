"""Samples beside real images: an example of each class, and the training image that is nearest to a sample."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ddpm.data.dataset import Dataset, load_dataset
from ddpm.errors import UserError
from ddpm.evaluation.metrics import nearest
from ddpm.sampling.pipeline import Pipeline

TESTED = 500  # test images whose distances to the training set are measured


@dataclass(frozen=True)
class Neighbour:
    """The training image nearest to a sample, by the distance of pixels from 0 to 1, and how that compares with test images."""

    image: Tensor  # uint8 [H, H] or [H, H, 3]
    name: str  # of its class
    distance: float
    test_median: float  # of the distances of test images to the training set
    closer: float  # the share of test images that are closer to the training set than the sample


class Reality:
    """The data set `name`, loaded when it is first asked for."""

    def __init__(self, name: str):
        self.name = name
        self.data: Dataset | None = None
        self.test_distances: Tensor | None = None

    def of(self, pipeline: Pipeline) -> Dataset:
        """The data set. Raises UserError if it isn't there, or isn't what this model was trained on."""
        try:
            self.data = self.data or load_dataset(self.name)
        except UserError:
            raise UserError(f"the images of {self.name} aren't here; `dvc repro download` brings them") from None
        if self.data.image_shape != tuple(pipeline.image_shape) or list(self.data.classes) != list(pipeline.classes):
            raise UserError(f"this model was trained on other images than {self.name}, which params.yaml names")
        return self.data

    def examples(self, pipeline: Pipeline) -> Tensor:
        """One training image of each class, uint8 [classes, H, H] or [classes, H, H, 3]."""
        data = self.of(pipeline)
        return torch.stack([data.images[int((data.labels == c).nonzero()[0])] for c in range(len(data.classes))])

    def neighbour(self, image: Tensor, pipeline: Pipeline) -> Neighbour:
        data = self.of(pipeline)
        if self.test_distances is None:
            some = data.test_images[:: -(-len(data.test_images) // TESTED)]
            self.test_distances, _ = nearest(some, data.images)
        distance, index = nearest(image[None], data.images)
        return Neighbour(
            image=data.images[int(index)],
            name=data.classes[int(data.labels[int(index)])] if data.classes else "none",
            distance=distance.item(),
            test_median=self.test_distances.median().item(),
            closer=(self.test_distances < distance).float().mean().item(),
        )
