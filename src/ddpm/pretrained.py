"""The trained model that comes with the repository, and how its card says that it is sampled."""

import json
from pathlib import Path

from ddpm.checkpoint import PRETRAINED
from ddpm.params import SampleParams, UserError

FOLDER, MODEL, CARD = PRETRAINED.parent, PRETRAINED, PRETRAINED.with_name("card.json")
SAMPLES = PRETRAINED.with_name("samples.npz")  # not in git: those that the card's metrics are of


def sampling(root: Path = Path()) -> SampleParams:
    """As in the run that judged it. Raises UserError where the card is missing or damaged."""
    try:
        return SampleParams.model_validate(json.loads((root / CARD).read_text())["params"]["sample"])
    except (OSError, ValueError, LookupError, TypeError):  # pydantic raises ValueError
        raise UserError(f"{CARD}: missing or damaged; `git checkout {CARD}` brings it back") from None
