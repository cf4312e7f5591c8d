"""Sends a run's journal to MLflow's store: connects on first use, and gives up if a problem lasts too long at the end.

What the store doesn't take holds up nothing else. There are two lanes: parameters, metrics, tags and the end of the run never
wait for files, pictures, data sets or models; each of these waits only for what the run logged before it. What the store refuses
is set aside: it stays in the journal, and `src/ship.py` sends it.
"""

import sys
import threading
import time
from collections import deque
from dataclasses import dataclass
from itertools import islice, takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.errors import UserError
from ddpm.params import FASHION_MNIST
from ddpm.tracking.client import ARTIFACTS, connect, find_experiment
from ddpm.tracking.connection import Answer, answer, experiment_name, root_cause, tracking_uri, without_password
from ddpm.tracking.journal import Entry, Journal
from ddpm.tracking.queries import newest_run
from ddpm.tracking.stored_run import FILES, StoredRun
from ddpm.tracking.views import furnish

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

EXIT_SECONDS = 10  # how long the end of a run waits for a store that has a problem
SLOW_SECONDS = 120  # and for a store that is only slow, for example because its database is being created
MAX_BATCH = 1000  # metrics per call, MLflow's limit
SIDE = {  # the kinds of entries in the side lane, and what messages call them
    "preview": "sample previews",
    "artifact": "files",
    "dataset": "the data set",
    "model": "the model in the tab Models",
    "register": "the model's version in the registry",
    "best_evaluation": "the training's best evaluation",
}
DELETED = "somebody deleted this run in MLflow; restore it there first"
MAIN = {"start": "parameters", "metric": "metrics", "tags": "tags", "end": "the end of the run"}


@dataclass
class Lane:
    """What holds up one of the two threads that send."""

    problem: str | None = None  # the latest one; None once sending works again
    since: float = 0.0  # when it began, by time.monotonic()
    told: bool = False  # whether a warning was printed about it


class Store:
    """Sends a journal's entries to its run in MLflow, which it creates or finds."""

    def __init__(self, root: Path, journal: Journal, start: dict[str, Any]) -> None:
        self.root, self.outbox, self.start = root, journal.outbox, start
        self.data_set: str = start["params"].get("data.name", FASHION_MNIST)
        self.uri = tracking_uri(root)
        self.address = without_password(self.uri)
        self.run: StoredRun | None = None  # until the store was reached
        self.waiting: list[Entry] = []  # the side lane's: what the run logged before them is sent
        self.refusal: str | None = None  # why an entry was set aside
        self.told: set[str] = set()  # the kinds of entries that a warning was printed about
        self.main, self.side = Lane(), Lane()
        self.given_up = False

    @property
    def problem(self) -> str | None:
        """What holds up a lane."""
        return self.main.problem or self.side.problem

    def send_main(self, queue: deque[Entry], count: int) -> None:
        """Send the first `count` entries of the queue in order, and let those of the side lane wait for `send_side`.

        What is sent leaves the queue. Raises what the store answered if something has to be sent again, and UserError if the run
        was deleted.
        """
        run = self.run or self.open()
        while count and not self.given_up:
            entries = _leading_metrics(queue, min(count, MAX_BATCH)) or [queue[0]]
            if _kind(entries[0]) in SIDE:
                self.waiting.append(entries[0])
            elif error := self._send(run, entries):
                raise error
            for _ in entries:
                queue.popleft()
                count -= 1

    def send_side(self) -> None:
        """Send each waiting entry. Raises as `send_main` does, after it has tried the others."""
        last, no_answer = None, False
        for entry in self.waiting.copy():
            is_file = _kind(entry) in FILES
            if self.given_up or (is_file and no_answer):  # this file would have to wait as long
                continue
            assert self.run  # nothing waits before there is one
            error = self._send(self.run, [entry])
            if error is None:
                self.waiting.remove(entry)
            elif is_file and answer(error) is Answer.LATER:
                no_answer = True
            last = error or last
        if last:
            raise last

    def _send(self, run: StoredRun, entries: list[Entry]) -> Exception | None:
        """Send entries, or set them aside if they are refused; the error if they have to be sent again."""
        try:
            run.log(entries)
        except Exception as error:
            meaning, kind = answer(error), _kind(entries[0])
            if meaning not in (Answer.REFUSED, Answer.LACKING) or self.given_up:
                return error
            if run.is_deleted():
                raise UserError(DELETED) from None
            name, reason = {**SIDE, **MAIN}[kind], root_cause(error)
            if meaning is Answer.LACKING and kind in SIDE:
                run.discard(entries[0])
                message = f"can't take {name}, perhaps because it is too old ({reason}); the run continues without"
            else:
                self.refusal = f"refused {name}: {reason}"
                message = f"{self.refusal}; everything else is sent"
            if kind not in self.told:
                self.told.add(kind)
                print(f"warning: MLflow at {self.address} {message}", file=sys.stderr)
        return None

    def open(self) -> StoredRun:
        """Connect, and create the run unless an earlier process with this journal has done so.

        Raises UserError if that run or the experiment was deleted.
        """
        client = connect(self.root)
        experiment = self._experiment(client)
        furnish(client, experiment, self.data_set)
        self.run = self._find_or_create_run(client, experiment.experiment_id)
        if self.start["system_metrics"]:
            self.run.start_monitor()
        return self.run

    def _experiment(self, client: "MlflowClient") -> "Experiment":
        """The experiment, which is created if it doesn't exist."""
        from mlflow.exceptions import MlflowException

        if experiment := find_experiment(client, self.data_set):
            return experiment
        name = experiment_name(self.data_set)
        has_artifacts = self.uri.startswith(("http:", "https:", "databricks"))  # a server, which chooses where artifacts are
        location = None if has_artifacts else (self.root / ARTIFACTS / name).as_uri()
        try:
            return client.get_experiment(client.create_experiment(name, artifact_location=location))
        except MlflowException as error:
            is_there = error.error_code == "RESOURCE_ALREADY_EXISTS"  # another machine has just created it
            if not is_there or (experiment := find_experiment(client, self.data_set)) is None:
                raise
            return experiment

    def _find_or_create_run(self, client: "MlflowClient", experiment: str) -> StoredRun:
        start, parent_id = self.start, None
        if checkpoint := start["checkpoint_sha256"]:
            made_it = f"tags.stage = 'train' and tags.checkpoint_sha256 = '{checkpoint}' and status = 'FINISHED'"
            if parent := newest_run(client, experiment, made_it):
                parent_id = parent.info.run_id
        if run := newest_run(client, experiment, f"tags.journal = '{start['journal']}'", deleted=True):
            if run.info.lifecycle_stage == "deleted":
                raise UserError(DELETED)
            client.update_run(run.info.run_id, status="RUNNING")
        else:
            tags = {**start["tags"], "journal": start["journal"], "stage": start["stage"]}
            if checkpoint:
                tags["checkpoint_sha256"] = checkpoint
            if parent_id:
                tags["mlflow.parentRunId"] = parent_id
            run = client.create_run(experiment, start["time"], tags, start["name"])
        return StoredRun(
            client=client,
            root=self.root,
            outbox=self.outbox,
            data_set=self.data_set,
            experiment_id=experiment,
            run_id=run.info.run_id,
            artifact_uri=run.info.artifact_uri,
            parent_id=parent_id,
        )

    def report(self, lane: Lane, error: Exception) -> None:
        """Print a warning when a lane's problem begins, but not again while it lasts."""
        if self.given_up or (lane is self.side and self.main.problem):  # that one holds up everything
            return
        is_new = lane.problem is None
        lane.problem = root_cause(error)
        if is_new:
            lane.since, lane.told = time.monotonic(), False
            if lane is self.side:  # the next time: by then the main lane has seen whether it holds up everything
                return
        if not lane.told:
            lane.told = True
            by_user = isinstance(error, UserError) or answer(error) is Answer.DENIED
            until = "this is fixed" if by_user else "the server answers"
            held_up = "everything" if lane is self.main else ", ".join(dict.fromkeys(SIDE[_kind(e)] for e in self.waiting))
            told = f"{lane.problem}; the run continues and sends {held_up} once {until}"
            print(f"warning: MLflow at {self.address}: {told}", file=sys.stderr)

    def wait_for(self, thread: threading.Thread, queue: deque[Entry]) -> None:
        """Return when the thread that sends has ended, or give up when a lane had a problem or was slow for too long.

        `queue` is the main lane's; until it is empty, a problem of the side lane doesn't count.
        """
        began = main_ended = time.monotonic()
        while thread.is_alive() and not self.given_up:
            thread.join(0.1)
            now = time.monotonic()
            if queue:
                main_ended = now
            waits = [now - max(began, self.main.since)] if self.main.problem else []
            waits += [now - max(main_ended, self.side.since)] if self.side.problem else []
            self.given_up = now - began > SLOW_SECONDS or any(wait > EXIT_SECONDS for wait in waits)


def _leading_metrics(queue: deque[Entry], limit: int) -> list[Entry]:
    entries = queue.copy()  # in one step, because the program may append to the queue at the same time
    return list(takewhile(lambda entry: "metric" in entry, islice(entries, limit)))


def _kind(entry: Entry) -> str:
    return next(iter(entry))
