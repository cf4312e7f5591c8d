"""`python src/ship.py FOLDER`: send MLflow the run that it could not take when it ran.

FOLDER, under `.resume/`, is what the run's warning named. `python src/ship.py models/pretrained/runs.zip` sends the runs of
the model that comes with the repository, out of an archive of such folders. What MLflow has already it doesn't take twice.
"""

import argparse
import tempfile
import zipfile
import zlib
from pathlib import Path

from ddpm.errors import UserError
from ddpm.paths import project_root
from ddpm.runtime.cli import clean_errors
from ddpm.tracking.run import ship


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("folder", type=Path, help=".resume/…, as the run's warning said; or an archive of such folders")
    path = parser.parse_args().folder.resolve()
    if not path.is_file():
        ship_folder(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        except (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile):
            raise UserError(f"{path}: no archive of runs, or damaged") from None
        for run in sorted(Path(folder).iterdir()):
            ship_folder(run)


def ship_folder(folder: Path) -> None:
    if not (folder / "journal.jsonl").is_file():
        raise UserError(f"{folder}: holds no journal.jsonl; it has been shipped, or is another folder than the warning named")
    print(f"shipped to MLflow at {ship(folder, project_root())}")


if __name__ == "__main__":
    with clean_errors():
        main()
