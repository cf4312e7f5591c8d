"""`python src/ship.py FOLDER`: send MLflow the run that it could not take when it ran.

FOLDER, under `.resume/`, is what the run's warning named. `python src/ship.py models/pretrained/runs.tar.gz` sends the runs of
the model that comes with the repository, out of an archive of such folders. What MLflow has already it doesn't take twice.
"""

import gzip
import io
import sys
import tarfile
import tempfile
import zlib
from pathlib import Path

from ddpm.params import UserError, clean_errors, project_root
from ddpm.tracking import ship


def main() -> None:
    if len(sys.argv) != 2:
        raise UserError("one folder is needed: python src/ship.py .resume/…, as the run's warning said; or an archive of such")
    path = Path(sys.argv[1]).resolve()
    if not path.is_file():
        ship_folder(path)
        return
    with tempfile.TemporaryDirectory() as folder:
        try:
            content = gzip.decompress(path.read_bytes())  # as a whole: its checksum is at the end
            with tarfile.open(fileobj=io.BytesIO(content)) as archive:
                archive.extractall(folder, filter="data")
        except (OSError, EOFError, zlib.error, tarfile.TarError):
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
