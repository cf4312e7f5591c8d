"""`python src/ship.py FOLDER`: send MLflow the run that it could not take when it ran.

FOLDER, under `.resume/`, is what the run's warning named. What MLflow has already it doesn't take twice.
"""

import sys
from pathlib import Path

from ddpm.params import UserError, clean_errors, project_root
from ddpm.tracking import ship


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("one folder is needed: python src/ship.py .resume/…, as the run's warning said")
    folder = Path(sys.argv[1]).resolve()
    if not (folder / "journal.jsonl").is_file():
        raise UserError(f"{folder}: holds no journal.jsonl; it has been shipped, or is another folder than the warning named")
    print(f"shipped to MLflow at {ship(folder, project_root())}")


if __name__ == "__main__":
    with clean_errors():
        main()
