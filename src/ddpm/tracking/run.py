"""The MLflow run of a stage: a journal on disk, and a thread that ships it.

The program only appends to the journal and never waits for the store. A daemon thread sends what was appended, in
batches; what fails stays queued and is tried again. A run that is interrupted and resumed appends to the same journal
and goes on in the same MLflow run: a step that it computes again keeps its journalled value and time, and since MLflow
keys metrics by both, shipping the whole journal once more makes no doubles.

A journal that was left behind because the store could not be reached is shipped by `src/ship.py`.
"""

import shutil
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ddpm.errors import UserError
from ddpm.files import sync
from ddpm.runtime.distributed import is_lost_process_error
from ddpm.runtime.run_folder import lock_folder
from ddpm.tracking.connection import root_cause
from ddpm.tracking.journal import Journal
from ddpm.tracking.provenance import describe, flatten
from ddpm.tracking.store import Store

RETRY_SECONDS = 2
SHIP_SECONDS = 1  # between two shipments, so that they are batches


class Run:
    """One MLflow run. Its methods return at once; `finish` waits for the store, but not for ever."""

    def __init__(self, root: Path, folder: Path, start: dict):
        self.journal = Journal(folder)
        self.queue = deque(e for e in self.journal.entries if "end" not in e)  # it has not ended after all
        self.logged = {(e.get("metric", "preview"), e["step"]) for e in self.queue if "step" in e}
        self.start = {**start, "journal": uuid.uuid4().hex, "time": _now()}
        self.store = Store(root, self.journal, next((e["start"] for e in self.queue if "start" in e), self.start))
        self.finishing, self.shipped, self.refused = threading.Event(), threading.Event(), False
        self.thread, self.shipping = None, threading.Lock()

    def begin(self, required: bool) -> None:
        """Raises UserError if the store is required and can't be reached; then there is no run."""
        if new := not self.journal.entries:
            self._append({"start": self.start})
        if required:
            self.journal.sync()
            try:
                self.store.open()
            except Exception as error:
                self.refused = True
                if new:
                    self.journal.path.unlink()
                told = f"MLflow at {self.store.address}: {root_cause(error)}"
                raise UserError(f"{told}; mend that, or set runtime.require_mlflow: false") from None
        self._start_shipping()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if (name, step) not in self.logged:
                self.logged.add((name, step))
                self._append({"metric": name, "value": value, "step": step, "time": _now()})

    def preview(self, step: int, png: bytes) -> None:
        """An image that the UI shows under a slider of steps."""
        if ("preview", step) not in self.logged:
            self.logged.add(("preview", step))
            self._append({"preview": self.journal.deposit("preview.png", png), "step": step, "time": _now()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._append({"artifact": self.journal.deposit(path.name, path.read_bytes()), "folder": folder})

    def tags(self, values: dict[str, object]) -> None:
        self._append({"tags": {name: str(value) for name, value in values.items()}})

    def dataset(self, name: str, digest: str, source: str, profile: dict, context: str) -> None:
        self._append({"dataset": {"name": name, "digest": digest, "source": source, "profile": profile, "context": context}})

    def best_evaluation(self, values: dict[str, float]) -> None:
        """Let the train run that this run evaluates carry these metrics, if they are its best yet."""
        self._append({"best_evaluation": values, "time": _now()})

    def register(self, checkpoint: bytes, sampling: dict) -> None:
        """Let the model that this run evaluated be a version in MLflow's registry, served with this way of sampling."""
        self._append({"register": self.journal.deposit("diffusion_model.pth", checkpoint), "sampling": sampling})

    def finish(self, status: str) -> None:
        """End the run. What the store has not taken by then is kept, and a printed command ships it.

        The folder of a FINISHED run is removed, the journal after the states: whoever is killed in between goes on in the
        same MLflow run.
        """
        if self.refused:
            self.journal.file.close()
            return
        end = {"end": status, "time": _now()}
        with suppress(UserError):  # the disk is full; the store may take it all the same
            self.journal.append(end)
        self.queue.append(end)
        self.finishing.set()
        if self.thread is None:  # a signal was quicker
            self._start_shipping()
        self.store.wait(self.thread)
        self.journal.file.close()
        folder = self.journal.folder
        if status == "FINISHED":
            for state in folder.glob("*.pt"):
                state.unlink()
            sync(folder)
            if self.shipped.is_set():
                shutil.rmtree(folder)
            else:  # the next run of this configuration is a new one
                folder = folder.rename(folder.with_name(f"unshipped-{self.store.start['journal'][:12]}"))
        if not self.shipped.is_set():
            print(
                f"warning: MLflow at {self.store.address} has not taken all of this run ({self.store.problem or 'no answer'}); "
                f"it is kept, and `python src/ship.py {folder}` ships it",
                file=sys.stderr,
            )

    def _append(self, entry: dict) -> None:
        self.journal.append(entry)
        self.queue.append(entry)

    def _start_shipping(self) -> None:
        thread = threading.Thread(target=self._ship, daemon=True)
        thread.start()  # a signal in here leaves open whether it runs
        self.thread = thread

    def _ship(self) -> None:
        with self.shipping:  # a second thread, started because of that, finds what the first has left
            self._ship_all()

    def _ship_all(self) -> None:
        while not self.store.given_up:
            try:
                finishing = self.finishing.is_set()  # asked first: then the queue has all there will be
                if count := len(self.queue):
                    self.journal.sync()  # or after a power cut the store would have what the journal forgot
                    self.store.ship(self.queue, count)
                elif finishing:
                    self.shipped.set()
                    return
                self.finishing.wait(SHIP_SECONDS)
            except ImportError as error:  # a machine without MLflow: the journal is shipped from another
                self.store.problem = root_cause(error)
                return
            except Exception as error:  # whatever the store's trouble is, the run goes on and the thread tries again
                self.store.in_trouble(root_cause(error))
                time.sleep(RETRY_SECONDS)


@contextmanager
def start_run(
    stage: str,
    params: dict,
    root: Path,
    folder: Path,
    device: str = "cpu",
    required: bool = False,
    checkpoint_sha256: str | None = None,
) -> Iterator[Run]:
    """The MLflow run of a stage, FINISHED, FAILED or KILLED by how the block ends.

    `folder` keeps the journal, beside the states (`*.pt`) that the stage could go on from, and is removed when the run has
    FINISHED. With `checkpoint_sha256` the run becomes a child of the newest finished train run that made that checkpoint, if
    the store has one. Raises UserError where MLflow is `required` and can't be reached.
    """
    name, tags = describe(stage, params)
    start = {
        "stage": stage,
        "name": name,
        "params": flatten(params),
        "tags": {**tags, "device": device},
        "checkpoint_sha256": checkpoint_sha256,
        "system_metrics": stage == "train",
    }
    run = Run(root, folder, start)
    try:
        run.begin(required)
        yield run
    except BaseException as error:
        run.finish("FAILED" if isinstance(error, Exception) and not is_lost_process_error(error) else "KILLED")
        raise
    run.finish("FINISHED")


def ship(folder: Path, root: Path) -> str:
    """Send the store the whole journal in `folder`, once more what it has already; the store's address.

    The folder is removed unless a run can go on in it. Raises UserError where that run is under way, or the store away.
    """
    with lock_folder(folder):
        journal = Journal(folder)
        start = next((e["start"] for e in journal.entries if "start" in e), None)
        if start is None:
            raise UserError(f"{journal.path}: holds no run")
        store, queue = Store(root, journal, {**start, "system_metrics": False}), deque(journal.entries)
        if "end" not in queue[-1]:  # its process was killed
            queue.append({"end": "KILLED", "time": _now()})
        try:
            store.ship(queue, len(queue))
        except Exception as error:
            raise UserError(f"MLflow at {store.address}: {root_cause(error)}") from None
        journal.file.close()
        if journal.entries[-1].get("end") == "FINISHED" and not list(folder.glob("*.pt")):
            shutil.rmtree(folder)
    return store.address


def mark_killed(folder: Path, root: Path) -> None:
    """Let the run in `folder`, whose process is lost, be KILLED until it is gone on with; in the store if that answers."""
    if not (folder / "journal.jsonl").exists():  # it was lost before there was one
        return
    journal = Journal(folder)
    if start := next((e["start"] for e in journal.entries if "start" in e), None):
        end = journal.entries[-1]
        if "end" not in end:
            journal.append(end := {"end": "KILLED", "time": _now()})
        with suppress(Exception):  # once more where it was lost before MLflow had it
            Store(root, journal, {**start, "system_metrics": False}).ship(deque([end]), 1)
    journal.file.close()


def _now() -> int:
    return time.time_ns() // 1_000_000
