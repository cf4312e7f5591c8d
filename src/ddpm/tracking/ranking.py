"""Which of two evaluations is better.

It decides which evaluation a training's run and a registered version show, and which version is the champion. Where two can't be
compared, a training shows the newer one, and the champion stays.
"""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    fid: float
    samples: int
    evaluator: str  # SHA-256 of the classifier whose features the FID compares
    data: str | None  # SHA-256 of the data set; None if it isn't known

    @classmethod
    def from_tags(cls, fid: float, tags: Mapping[str, str]) -> "Evaluation":
        """From the tags of an evaluation's run, or of the version that it made. Raises KeyError if they aren't there."""
        return cls(fid, int(tags["samples"]), tags["evaluator_sha256"], tags.get("data_sha256"))


def is_comparable(new: Evaluation, old: Evaluation) -> bool:
    """Whether the figures say anything about each other: the same evaluator compared samples with the same data set."""
    return new.evaluator == old.evaluator and (new.data == old.data or None in (new.data, old.data))


def is_better(new: Evaluation, old: Evaluation) -> bool:
    """Whether the new evaluation has a lower FID, of at least as many samples: with fewer, FID is higher, and says less."""
    return is_comparable(new, old) and new.samples >= old.samples and new.fid < old.fid
