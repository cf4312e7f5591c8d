""""""

import sys
from pathlib import Path

from ddpm.files import read_verified, write_verified

KEPT_STATES = 2  # the newest, and one to fall back to if the newest is damaged


def save_state(folder: Path, step: int, state: dict) -> None:
    """Keep the state after `step` steps, and the one before it."""
    write_verified(folder / f"state-{step:08d}.pt", state)
    for old in sorted(folder.glob("state-*.pt"))[:-KEPT_STATES]:
        old.unlink()


def load_state(folder: Path) -> dict | None:
    """The newest undamaged state in `folder`, on the CPU; None where there is none."""
    for path in sorted(folder.glob("state-*.pt"), reverse=True):
        if state := read_verified(path):
            return state
        print(f"warning: {path} is damaged; falling back to the state before it", file=sys.stderr)
        path.unlink(missing_ok=True)  # or it would be kept in the place of a good one
    return None
