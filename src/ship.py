"""`python src/ship.py FOLDER`: send MLflow a run that was kept because MLflow was unreachable.

The warning that the run printed names FOLDER, which is in `.resume/`. `python src/ship.py models/pretrained/runs.zip` sends the
runs of the model that comes with the repository, from an archive of such folders. What MLflow already has isn't stored twice.
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
    parser.add_argument(
        "folder", type=Path, help="the folder that the run's warning named, .resume/…; or a zip archive of such folders"
    )
    path = parser.parse_args().folder.resolve()
    if not path.is_file():
        ship_folder(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            with zipfile.ZipFile(path) as archive:
                archive.extractall(folder)
        except (OSError, EOFError, RuntimeError, ValueError, zlib.error, zipfile.BadZipFile):
            raise UserError(f"{path}: corrupt, or not a zip archive of runs") from None
        problems = []
        for run in sorted(Path(folder).iterdir()):
            try:
                ship_folder(run)
            except UserError as error:  # of one run; the others are sent all the same
                problems.append(str(error))
        if problems:
            raise UserError("; ".join(problems))


def ship_folder(folder: Path) -> None:
    """Send the run in a folder. Raises UserError if there is none, or if MLflow is unreachable."""
    if not (folder / "journal.jsonl").is_file():
        raise UserError(
            f"{folder}: contains no journal.jsonl; either it was already sent, or the run's warning named another folder"
        )
    print(f"sent to MLflow at {ship(folder, project_root())}")


if __name__ == "__main__":
    with clean_errors():
        main()
