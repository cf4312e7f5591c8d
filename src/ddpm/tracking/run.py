"""A stage's MLflow run: a journal on disk, and threads that send the journal to MLflow's store.

The program only appends to the journal and never waits for the store. A daemon thread sends what was appended, in batches, and a
second one sends files, pictures, data sets and models. What fails stays where it is, and the thread tries again.

A run that is interrupted and resumed appends to the same journal and continues the same MLflow run. A step that is computed
again keeps the value and time that the journal has. MLflow identifies a metric's values by both, so that sending a whole journal
again makes no duplicates. `src/ship.py` does that with a journal that was kept because the store was unreachable.
"""

import shutil
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from ddpm.errors import UserError
from ddpm.runtime.run_folder import lock_folder
from ddpm.tracking.connection import root_cause
from ddpm.tracking.journal import Entry, Journal
from ddpm.tracking.provenance import describe, flatten
from ddpm.tracking.registry import CHECKPOINT
from ddpm.tracking.store import Lane, Store

RETRY_SECONDS = 2
SHIP_SECONDS = 1  # between two sendings, so that each sends a batch


@contextmanager
def start_run(
    stage: str,
    params: dict[str, Any],
    root: Path,
    folder: Path,
    device: str = "cpu",
    required: bool = False,
    checkpoint_sha256: str | None = None,
    on_finished: Callable[[], None] | None = None,
) -> Iterator["Run"]:
    """The MLflow run of a stage: FINISHED, FAILED or KILLED, depending on how the block ends.

    `folder` keeps the journal and is removed when the run is FINISHED. Right before that, `on_finished` is called. The caller
    can delete its training states there: if the process is killed in between, the next one continues the same MLflow run.
    With `checkpoint_sha256` the run is a child of the newest finished training that made this checkpoint, if the store has one.
    Raises UserError if MLflow is `required` and unreachable.
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
    run = Run(root, folder, start, on_finished)
    try:
        run.begin(required)
        yield run
    except BaseException as error:
        from ddpm.runtime.distributed import is_lost_process_error  # imports PyTorch, which ship.py does without

        run.finish("FAILED" if isinstance(error, Exception) and not is_lost_process_error(error) else "KILLED")
        raise
    run.finish("FINISHED")


class Run:
    """One MLflow run. The methods that log return at once and raise UserError if the journal can't be written."""

    def __init__(self, root: Path, folder: Path, start: dict[str, Any], on_finished: Callable[[], None] | None = None) -> None:
        self.on_finished = on_finished
        self.journal = Journal(folder)
        self.queue = deque(entry for entry in self.journal.entries if "end" not in entry)  # the run has not ended, it is resumed
        self.logged = {(entry.get("metric", "preview"), entry["step"]) for entry in self.queue if "step" in entry}
        self.start = {**start, "journal": uuid.uuid4().hex, "time": _now()}
        self.store = Store(root, self.journal, self.journal.start or self.start)
        self.rejected = False  # MLflow was required, and unreachable
        self.thread: threading.Thread | None = None
        self.sending = threading.Lock()
        self.finishing = threading.Event()

    def begin(self, required: bool) -> None:
        """Start sending. Raises UserError if the store is required and unreachable; then there is no run."""
        is_new = not self.journal.entries
        if is_new:
            self._append({"start": self.start})
        if required:
            self.journal.sync()
            try:
                self.store.open()
            except Exception as error:
                self.rejected = True
                if is_new:
                    self.journal.path.unlink()
                problem = f"MLflow at {self.store.address}: {root_cause(error)}"
                raise UserError(f"{problem}; fix the connection, or set runtime.require_mlflow: false") from None
        self._start_thread()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        """Log values of a step. Those that the journal already has stay as they are."""
        for name, value in values.items():
            if (name, step) not in self.logged:
                self.logged.add((name, step))
                self._append({"metric": name, "value": value, "step": step, "time": _now()})

    def preview(self, step: int, png: bytes) -> None:
        """Log an image, which the UI shows under a slider of steps."""
        if ("preview", step) not in self.logged:
            self.logged.add(("preview", step))
            self._append({"preview": self.journal.deposit("preview.png", png), "step": step, "time": _now()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        """Log a copy of a file, in a folder of the run's artifacts."""
        self._append({"artifact": self.journal.deposit(path.name, path.read_bytes()), "folder": folder})

    def tags(self, values: Mapping[str, object]) -> None:
        self._append({"tags": {name: str(value) for name, value in values.items()}})

    def dataset(self, name: str, digest: str, source: str, profile: dict[str, Any], context: str) -> None:
        """Log which data set was used: a hash of it, where it is, its sizes as `profile`, and for what as `context`."""
        self._append({"dataset": {"name": name, "digest": digest, "source": source, "profile": profile, "context": context}})

    def model(self, params: dict[str, Any], tags: Mapping[str, object]) -> None:
        """List the model that this run trained in MLflow's tab Models."""
        self._append({"model": {"params": flatten(params), "tags": dict(tags)}})

    def best_evaluation(self, values: dict[str, float]) -> None:
        """Copy these metrics to the training's run and its model, if they are the best evaluation of that model so far."""
        self._append({"best_evaluation": values, "time": _now()})

    def register(self, checkpoint: bytes, sampling: dict[str, Any]) -> None:
        """Make the evaluated model a version in MLflow's registry, which is served with this `sample` section."""
        self._append({"register": self.journal.deposit(CHECKPOINT, checkpoint), "sampling": sampling})

    def finish(self, status: str) -> None:
        """End the run, and wait until the store has everything or has had a problem for too long.

        If the store lacks a part of the journal, the journal is kept, and a warning says which command sends it. The folder of a
        FINISHED run is then renamed, so that the next run of the same configuration starts a new journal.
        """
        if self.rejected:
            self.journal.file.close()
            return
        end = {"end": status, "time": _now()}
        with suppress(UserError):  # the disk is full; the store may get the entry all the same
            self.journal.append(end)
        self.queue.append(end)
        self.finishing.set()
        thread = self.thread or self._start_thread()  # a signal may have come before the thread was started
        self.store.wait_for(thread, self.queue)
        all_sent = not (self.queue or self.store.waiting or self.store.refusal)
        self.journal.file.close()
        folder = self.journal.folder
        if status == "FINISHED":
            if self.on_finished:
                self.on_finished()
            if all_sent:
                shutil.rmtree(folder)
            else:
                folder = folder.rename(folder.with_name(f"unshipped-{self.store.start['journal'][:12]}"))
        if not all_sent:
            problem = self.store.problem or (self.store.refusal and f"it {self.store.refusal}") or "no answer"
            print(
                f"warning: MLflow at {self.store.address} has not received all of this run ({problem}); "
                f"it is kept, and `python src/ship.py {folder}` sends it",
                file=sys.stderr,
            )

    def _append(self, entry: Entry) -> None:
        self.journal.append(entry)
        self.queue.append(entry)

    def _start_thread(self) -> threading.Thread:
        thread = threading.Thread(target=self._send, daemon=True)
        thread.start()  # if a signal interrupts start(), the thread may or may not be running
        self.thread = thread
        return thread

    def _send(self) -> None:
        with self.sending:  # after such a signal there may be a second thread: it sends what the first one left
            main_sent = threading.Event()
            side = threading.Thread(
                target=self._keep_sending, args=(self.store.side, self.store.send_side, main_sent), daemon=True
            )
            side.start()
            self._keep_sending(self.store.main, self._send_main, self.finishing)
            main_sent.set()
            side.join()

    def _send_main(self) -> None:
        if count := len(self.queue):
            self.journal.sync()  # else a power cut could leave the store with entries that the journal has lost
            self.store.send_main(self.queue, count)

    def _keep_sending(self, lane: Lane, send: Callable[[], None], last: threading.Event) -> None:
        """Send what a lane has, again and again, until that succeeds after the event, which comes after the last entry."""
        while not self.store.given_up:
            is_last = last.is_set()  # read before sending
            try:
                send()
                if self.store.given_up:
                    return
                lane.problem = None
                if is_last:
                    return
                last.wait(SHIP_SECONDS)
            except ImportError as error:  # MLflow isn't installed here; the journal can be sent from another machine
                lane.problem = root_cause(error)
                return
            except Exception as error:  # whatever the problem of the store, the run continues and this thread tries again
                self.store.report(lane, error)
                time.sleep(RETRY_SECONDS)


def ship(folder: Path, root: Path) -> str:
    """Send the whole journal in `folder`, including what the store already has; the address of the store.

    The folder is removed unless a run can be resumed from it. Raises UserError if a process is still using it, or if the store is
    unreachable or refuses a part; then it has the rest, and the folder stays.
    """
    with lock_folder(folder):
        journal = Journal(folder)
        if journal.start is None:
            raise UserError(f"{journal.path}: contains no run")
        store, queue = Store(root, journal, {**journal.start, "system_metrics": False}), deque(journal.entries)
        if "end" not in queue[-1]:  # the process of the run was killed
            queue.append({"end": "KILLED", "time": _now()})
        try:
            store.send_main(queue, len(queue))
            store.send_side()
        except Exception as error:
            raise UserError(f"MLflow at {store.address}: {root_cause(error)}") from None
        journal.file.close()
        if store.refusal:
            raise UserError(f"MLflow at {store.address} has this run, except what it {store.refusal}")
        if journal.entries[-1].get("end") == "FINISHED" and not list(folder.glob("*.pt")):
            shutil.rmtree(folder)
    return store.address


def mark_killed(folder: Path, root: Path) -> None:
    """Mark the run in `folder`, whose process was lost, as KILLED until it is resumed.

    The journal gets the mark always, the store if it answers.
    """
    if not (folder / "journal.jsonl").exists():  # the process was lost before it wrote one
        return
    journal = Journal(folder)
    if journal.start:
        end = journal.entries[-1]
        if "end" not in end:
            end = {"end": "KILLED", "time": _now()}
            journal.append(end)
        with suppress(Exception):  # sent even if the journal has it, because the process may have been lost before it sent it
            Store(root, journal, {**journal.start, "system_metrics": False}).send_main(deque([end]), 1)
    journal.file.close()


def _now() -> int:
    """Milliseconds since 1970, as MLflow counts."""
    return time.time_ns() // 1_000_000
