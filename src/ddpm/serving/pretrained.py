"""The trained model that comes with the repository: the sampling parameters that its metrics were measured with."""

import json
from pathlib import Path

from ddpm.errors import UserError
from ddpm.params import SampleParams
from ddpm.paths import PRETRAINED_CARD


def pretrained_sampling(root: Path = Path()) -> SampleParams:
    """The sampling parameters on the model's card. Raises UserError if the card is missing or corrupt."""
    try:
        return SampleParams.model_validate(json.loads((root / PRETRAINED_CARD).read_text("utf-8"))["params"]["sample"])
    except (OSError, ValueError, LookupError, TypeError):  # pydantic raises a ValueError
        raise UserError(f"{PRETRAINED_CARD}: missing or corrupt; `git checkout {PRETRAINED_CARD}` restores it") from None
