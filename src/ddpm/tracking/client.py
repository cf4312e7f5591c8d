"""A client of MLflow's store, and the experiment that runs belong to.

The store in the repository, `mlflow.db`, has absolute paths in it and the schema of the MLflow that wrote it. Before it is opened
it is made to fit this folder and the installed MLflow, after a copy of it was made.
"""

import os
import sqlite3
import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from filelock import FileLock

from ddpm.errors import UserError
from ddpm.paths import CACHE
from ddpm.tracking.connection import SQLITE, experiment_name, hide_info_logs, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

ARTIFACTS = "mlartifacts"  # in the repository: what MLflow keeps as files
LOCATIONS = (  # where the database names folders of artifacts: tables and columns
    *(("experiments", "artifact_location"), ("runs", "artifact_uri"), ("logged_models", "artifact_location")),
    *(("model_versions", "source"), ("model_versions", "storage_location")),
)


def connect(root: Path) -> "MlflowClient":
    """A client of the store that the repository `root` uses. A database that doesn't exist is created.

    Raises UserError if the database was written by a newer MLflow.
    """
    import mlflow

    hide_info_logs()
    uri = tracking_uri(root)
    if not uri.startswith(SQLITE):
        return mlflow.MlflowClient(uri, uri)
    (root / CACHE).mkdir(exist_ok=True)
    with FileLock(root / CACHE / "mlflow.lock"):  # two processes that create one database at the same time crash
        database = Path(uri.removeprefix(SQLITE))
        if database == root / "mlflow.db" and database.exists():  # another one may belong to others, too
            upgrade(database)
            relocate(database, root)
        return mlflow.MlflowClient(uri, uri)


def find_experiment(client: "MlflowClient", data_set: str) -> "Experiment | None":
    """The experiment that MLFLOW_EXPERIMENT_ID or MLFLOW_EXPERIMENT_NAME names, else the data set's; None if there is none.

    Raises UserError if there is none with this ID, or if it was deleted.
    """
    experiment: Experiment | None
    if wanted := os.environ.get("MLFLOW_EXPERIMENT_ID"):
        from mlflow.exceptions import MlflowException

        try:
            experiment = client.get_experiment(wanted)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise UserError(f"MLFLOW_EXPERIMENT_ID: there is no experiment {wanted}") from None
    else:
        experiment = client.get_experiment_by_name(experiment_name(data_set))
    if experiment and experiment.lifecycle_stage == "deleted":
        raise UserError(
            f"the experiment {experiment.name} was deleted; restore it in MLflow, or name another in MLFLOW_EXPERIMENT_NAME"
        )
    return experiment


def local_folder(uri: str) -> Path | None:
    """The folder of an artifact location on this machine; None if it is elsewhere."""
    parts = urlparse(uri)
    return Path(unquote(parts.path)) if parts.scheme in ("", "file") else None


def upgrade(database: Path) -> None:
    """Upgrade the schema of a SQLite database to that of the installed MLflow. Raises UserError if it is a newer one."""
    from alembic.script import ScriptDirectory
    from alembic.util import CommandError
    from mlflow.store.db import utils
    from mlflow.version import VERSION

    with closing(sqlite3.connect(database)) as connection:
        try:
            (found,) = connection.execute("SELECT version_num FROM alembic_version").fetchone() or (None,)
        except sqlite3.DatabaseError:  # empty, not a database of MLflow's, or damaged: MLflow's own message says more
            return
    known = ScriptDirectory.from_config(utils._get_alembic_config(db_url=""))
    if found in (None, known.get_current_head()):
        return
    try:
        known.get_revision(found)
    except CommandError:
        raise UserError(f"{database}: written by a newer MLflow than {VERSION}; install the version that wrote it") from None
    copy = database.with_name(f"{database.stem}-before-upgrade-{found}.db")
    if not copy.exists():  # else an upgrade from there was cut short
        back_up(database, copy)
    utils._upgrade_db(utils.create_sqlalchemy_engine_with_retry(f"{SQLITE}{database}"))
    print(f"note: {database.name} was upgraded to MLflow {VERSION}; {copy.name} is a copy from before", file=sys.stderr)


def relocate(database: Path, root: Path) -> None:
    """Let the locations in a database name the artifacts in `root`, where they name those of the folder it was in before.

    A location stays as it is if its folder is still there and `root` has none in its place.
    """
    with closing(sqlite3.connect(database)) as connection:
        try:
            locations = [location or "" for (location,) in connection.execute("SELECT artifact_location FROM experiments")]
        except sqlite3.DatabaseError:  # see above
            return
    moved = set()
    for location in locations:
        before, found, rest = location.rpartition(f"/{ARTIFACTS}/")
        there = local_folder(location)
        if not found or there is None:
            continue
        here = root / ARTIFACTS / unquote(rest)
        if not same(there, here) and (here.exists() or not there.exists()):
            moved.add(before)
    if not moved:
        return
    copy = database.with_name(f"{database.stem}-before-move.db")
    back_up(database, copy)
    with closing(sqlite3.connect(database)) as connection, connection:
        for before in moved:
            old = f"{before}/{ARTIFACTS}/"
            new = f"{root.as_uri() if before.startswith('file:') else root}/{ARTIFACTS}/"
            for table, column in LOCATIONS:
                change = f"UPDATE {table} SET {column} = ? || substr({column}, ?) WHERE substr({column}, 1, ?) = ?"
                connection.execute(change, (new, len(old) + 1, len(old), old))
    print(
        f"note: {database.name} named artifacts in {', '.join(sorted(str(local_folder(before)) for before in moved))}, "
        f"and now names those in {root}; {copy.name} is a copy from before",
        file=sys.stderr,
    )


def same(folder: Path, other: Path) -> bool:
    """Whether two paths are of one folder."""
    return folder == other or (folder.exists() and other.exists() and folder.samefile(other))


def back_up(database: Path, copy: Path) -> None:
    """Copy a SQLite database that others may be using."""
    unfinished = copy.with_suffix(".tmp")
    unfinished.unlink(missing_ok=True)
    with closing(sqlite3.connect(database)) as source, closing(sqlite3.connect(unfinished)) as target:
        source.backup(target)
    unfinished.replace(copy)
