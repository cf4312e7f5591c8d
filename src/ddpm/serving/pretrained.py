"""The trained model that comes with the repository, and how its card says that it is sampled."""

import json
from pathlib import Path

from ddpm.errors import UserError
from ddpm.params import SampleParams
from ddpm.paths import PRETRAINED_CARD


def pretrained_sampling(root: Path = Path()) -> SampleParams:
    """As in the run that judged it. Raises UserError where the card is missing or damaged."""
    try:
        return SampleParams.model_validate(json.loads((root / PRETRAINED_CARD).read_text())["params"]["sample"])
    except (OSError, ValueError, LookupError, TypeError):  # pydantic raises ValueError
        raise UserError(f"{PRETRAINED_CARD}: missing or damaged; `git checkout {PRETRAINED_CARD}` brings it back") from None
