"""Which of two evaluations is better."""

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Evaluation:
    fid: float
    samples: int
    evaluator: str  # SHA-256 of the classifier whose features the FID compares

    @classmethod
    def from_tags(cls, fid: float, tags: Mapping[str, str]) -> "Evaluation":
        """From the tags of an evaluation's run, or of the version that it made. Raises KeyError if they aren't there."""
        return cls(fid, int(tags["samples"]), tags["evaluator_sha256"])


def is_better(new: Evaluation, old: Evaluation, *, by_evidence: bool) -> bool:
    """Whether the new evaluation replaces the old one.

    With `by_evidence`, as among the evaluations of one training: more samples win, because they are better evidence, whatever
    the FID; at an equal number the lower FID wins. Figures of different evaluators can't be compared: the new ones win.

    Otherwise, as among the models in the registry: the new FID must be lower, by the same evaluator and with at least as many
    samples. FID is higher with fewer samples.
    """
    same_evaluator = new.evaluator == old.evaluator
    if by_evidence:
        old_stays = same_evaluator and (-old.samples, old.fid) <= (-new.samples, new.fid)
        return not old_stays
    return same_evaluator and new.samples >= old.samples and new.fid < old.fid
