"""Sends a run's journal to MLflow's store: connects on first use, and gives up if a problem lasts too long at the end."""

import sys
import threading
import time
from collections import deque
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock

from ddpm.paths import CACHE
from ddpm.tracking.connection import PERMANENT_ERRORS, experiment_name, hide_info_logs, tracking_uri, without_password
from ddpm.tracking.journal import Entry, Journal
from ddpm.tracking.queries import newest_run
from ddpm.tracking.stored_run import StoredRun

if TYPE_CHECKING:
    from mlflow import MlflowClient

EXIT_SECONDS = 10  # how long the end of a run waits for a store that has a problem
SLOW_SECONDS = 120  # and for a store that is only slow, for example because its database is being created
MAX_BATCH = 1000  # metrics per call, MLflow's limit


class Store:
    """Sends a journal's entries to its run in MLflow, which it creates or finds."""

    def __init__(self, root: Path, journal: Journal, start: dict[str, Any]) -> None:
        self.root, self.outbox, self.start = root, journal.outbox, start
        self.uri = tracking_uri(root)
        self.address = without_password(self.uri)
        self.run: StoredRun | None = None  # until the store was reached
        self.problem: str | None = None  # the latest one; None once sending works again
        self.problem_since = 0.0
        self.given_up = False

    def ship(self, queue: deque[Entry], count: int) -> None:
        """Send the first `count` entries of the queue in order. Each leaves the queue once the store has it."""
        run = self.run or self.open()
        from mlflow.exceptions import MlflowException

        while count and not self.given_up:
            metrics = _leading_metrics(queue, min(count, MAX_BATCH))
            if metrics:
                run.log_metrics(metrics)
            else:
                try:
                    run.log(queue[0])
                except MlflowException as error:
                    if error.error_code not in PERMANENT_ERRORS:
                        raise
                    reason = str(error).splitlines()[0][:200]
                    print(f"warning: MLflow at {self.address} refused to log {next(iter(queue[0]))}: {reason}", file=sys.stderr)
            for _ in range(max(len(metrics), 1)):
                queue.popleft()
                count -= 1
        self.problem = None

    def open(self) -> StoredRun:
        """Connect, and create the run unless an earlier process with this journal has done so."""
        import mlflow

        hide_info_logs()
        mlflow.set_tracking_uri(self.uri)
        (self.root / CACHE).mkdir(exist_ok=True)
        with FileLock(self.root / CACHE / "mlflow.lock"):  # two processes that create one database at the same time crash
            client = mlflow.MlflowClient(self.uri, self.uri)
            experiment = self._experiment(client)
        self.run = self._find_or_create_run(client, experiment)
        if self.start["system_metrics"]:
            self.run.start_monitor()
        return self.run

    def _experiment(self, client: "MlflowClient") -> str:
        """The id of the experiment, which is created if it doesn't exist."""
        from mlflow.exceptions import MlflowException

        name = experiment_name()
        if experiment := client.get_experiment_by_name(name):
            return experiment.experiment_id
        has_artifacts = self.uri.startswith(("http:", "https:", "databricks"))  # a server, which chooses where artifacts are
        location = None if has_artifacts else (self.root / "mlartifacts" / name).as_uri()
        try:
            return client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            is_there = error.error_code == "RESOURCE_ALREADY_EXISTS"  # another machine has just created it
            if not is_there or (experiment := client.get_experiment_by_name(name)) is None:
                raise
            return experiment.experiment_id

    def _find_or_create_run(self, client: "MlflowClient", experiment: str) -> StoredRun:
        start, parent_id = self.start, None
        if checkpoint := start["checkpoint_sha256"]:
            made_it = f"tags.stage = 'train' and tags.checkpoint_sha256 = '{checkpoint}' and status = 'FINISHED'"
            if parent := newest_run(client, experiment, made_it):
                parent_id = parent.info.run_id
        if run := newest_run(client, experiment, f"tags.journal = '{start['journal']}'"):
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {**start["tags"], "journal": start["journal"], "stage": start["stage"]}
            if checkpoint:
                tags["checkpoint_sha256"] = checkpoint
            if parent_id:
                tags["mlflow.parentRunId"] = parent_id
            run = client.create_run(experiment, start["time"], tags, start["name"])
        return StoredRun(client, self.root, self.outbox, experiment, run.info.run_id, parent_id)

    def report(self, problem: str) -> None:
        """Print a warning when a problem begins, but not again while it lasts."""
        if self.problem is None:
            print(
                f"warning: MLflow at {self.address}: {problem}; the run continues and sends everything once the server answers",
                file=sys.stderr,
            )
            self.problem_since = time.monotonic()
        self.problem = problem

    def wait_for(self, thread: threading.Thread) -> None:
        """Return when the thread that sends has ended, or give up when the store had a problem or was slow for too long."""
        began = time.monotonic()
        while thread.is_alive() and not self.given_up:
            thread.join(0.1)
            now = time.monotonic()
            too_slow = now - began > SLOW_SECONDS
            self.given_up = too_slow or (self.problem is not None and now - max(began, self.problem_since) > EXIT_SECONDS)


def _leading_metrics(queue: deque[Entry], limit: int) -> list[Entry]:
    entries = queue.copy()  # in one step, because the program may append to the queue at the same time
    return list(takewhile(lambda entry: "metric" in entry, islice(entries, limit)))
