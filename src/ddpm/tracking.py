"""Everything that knows MLflow: a journal on disk, and a thread that ships it.

The program only appends to the journal and never waits for the store. A daemon thread sends what was appended, in
batches; what fails stays queued and is tried again. A run that is interrupted and resumed appends to the same journal
and goes on in the same MLflow run: a step that it computes again keeps its journalled value and time, and since MLflow
keys metrics by both, shipping the whole journal once more makes no doubles.

A journal that was left behind because the store could not be reached is shipped by `src/ship.py`.
"""

import json
import logging
import os
import platform
import re
import shutil
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from itertools import islice, takewhile
from pathlib import Path

from ddpm.files import sync
from ddpm.journal import Journal
from ddpm.params import UserError
from ddpm.resume import hold

EXPERIMENT = "fashion-mnist-ddpm"  # MLFLOW_EXPERIMENT_NAME names another
RETRY_SECONDS = 2
SHIP_SECONDS = 1  # between two shipments, so that they are batches
EXIT_SECONDS = 10  # how long the end waits for a store that is in trouble
SLOW_SECONDS = 120  # and for one that is only slow, such as a database that is being created
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")  # asking again would change nothing
MAX_BATCH = 1000  # metrics that MLflow takes in one call

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "5")


def tracking_uri(root: Path) -> str:
    """MLFLOW_TRACKING_URI, a relative sqlite path in it taken from `root`; else the store embedded in the repository."""
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    prefix = "sqlite:///"
    if not uri:
        return f"{prefix}{root / 'mlflow.db'}"
    if uri.startswith(prefix):
        return f"{prefix}{root / uri.removeprefix(prefix)}"
    return uri


class Run:
    """One MLflow run. Its methods return at once; `finish` waits for the store, but not for ever."""

    def __init__(self, root: Path, folder: Path, start: dict):
        self.journal = Journal(folder)
        self.queue = deque(e for e in self.journal.entries if "end" not in e)  # it has not ended after all
        self.logged = {(e.get("metric", "preview"), e["step"]) for e in self.queue if "step" in e}
        self.start = {**start, "journal": uuid.uuid4().hex, "time": _now()}
        self.store = Store(root, self.journal, next((e["start"] for e in self.queue if "start" in e), self.start))
        self.finishing, self.shipped, self.refused = threading.Event(), threading.Event(), False
        self.thread = threading.Thread(target=self._ship, daemon=True)

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
                cause = _root_cause(error)
                raise UserError(f"MLflow at {self.store.uri}: {cause}; start it, or set runtime.require_mlflow: false") from None
        self.thread.start()

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
        if self.thread.ident is None:  # a signal was quicker
            self.thread.start()
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
                f"warning: MLflow at {self.store.uri} has not taken all of this run ({self.store.problem or 'no answer'}); "
                f"it is kept, and `python src/ship.py {folder}` ships it",
                file=sys.stderr,
            )

    def _append(self, entry: dict) -> None:
        self.journal.append(entry)
        self.queue.append(entry)

    def _ship(self) -> None:
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
                self.store.problem = _root_cause(error)
                return
            except Exception as error:  # whatever the store's trouble is, the run goes on and the thread tries again
                self.store.in_trouble(_root_cause(error))
                time.sleep(RETRY_SECONDS)


class Store:
    """The MLflow store's end of a run: creates it, or finds it again, and sends it the journal's entries."""

    def __init__(self, root: Path, journal: Journal, start: dict):
        self.root, self.journal, self.start = root, journal, start
        self.uri = tracking_uri(root)
        self.is_local = "://" not in self.uri or self.uri.startswith(("sqlite:", "file:"))
        self.problem: str | None = None  # the last one, while it lasts
        self.problem_since = 0.0
        self.given_up = False
        self.client = self.run_id = self.parent_id = self.monitor = None

    def in_trouble(self, problem: str) -> None:
        if self.problem is None:
            print(
                f"warning: MLflow at {self.uri}: {problem}; the run goes on, and MLflow gets everything once it answers",
                file=sys.stderr,
            )
            self.problem_since = time.monotonic()
        self.problem = problem

    def wait(self, thread: threading.Thread) -> None:
        """Till the thread that ships has done so, or the store has been slow or in trouble for too long."""
        began = time.monotonic()
        while thread.is_alive() and not self.given_up:
            thread.join(0.1)
            now = time.monotonic()
            too_slow = now - began > SLOW_SECONDS
            self.given_up = too_slow or (self.problem is not None and now - max(began, self.problem_since) > EXIT_SECONDS)

    def ship(self, queue: deque[dict], count: int) -> None:
        """Send the queue's first `count` entries in order; each leaves the queue when the store has it."""
        if self.run_id is None:
            self.open()
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        while count and not self.given_up:
            metrics = _leading_metrics(queue, min(count, MAX_BATCH))
            batch = [Metric(e["metric"], e["value"], e["time"], e["step"]) for e in metrics]
            if batch:
                self.client.log_batch(self.run_id, metrics=batch)
            else:
                try:
                    self._send(queue[0])
                except MlflowException as error:
                    if error.error_code not in REFUSED:
                        raise
                    said = str(error).splitlines()[0][:200]
                    print(f"warning: MLflow at {self.uri} refused to log {next(iter(queue[0]))}: {said}", file=sys.stderr)
            for _ in range(max(len(batch), 1)):
                queue.popleft()
                count -= 1
        self.problem = None

    def open(self) -> None:
        """Connect, and create the run unless an earlier process with this journal already did."""
        import mlflow
        from filelock import FileLock

        for chatty in ("mlflow", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        mlflow.set_tracking_uri(self.uri)
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
        (self.root / ".cache").mkdir(exist_ok=True)
        with FileLock(self.root / ".cache" / "mlflow.lock"):  # two processes that create one database at once crash
            self.client = mlflow.MlflowClient(self.uri)
            experiment = self.client.get_experiment_by_name(name)
            if experiment is None:
                location = (self.root / "mlartifacts" / name).as_uri() if self.is_local else None
                experiment_id = self.client.create_experiment(name, artifact_location=location)
            else:
                experiment_id = experiment.experiment_id
        self.experiment_id = experiment_id

        if checkpoint := self.start["checkpoint_sha256"]:
            parents = self._find(f"tags.stage = 'train' and tags.checkpoint_sha256 = '{checkpoint}' and status = 'FINISHED'")
            self.parent_id = parents[0].info.run_id if parents else None
        if mine := self._find(f"tags.journal = '{self.start['journal']}'"):
            self.run_id = mine[0].info.run_id
            self.client.update_run(self.run_id, status="RUNNING")
        else:
            tags = {**self.start["tags"], "journal": self.start["journal"], "stage": self.start["stage"]}
            if checkpoint:
                tags["checkpoint_sha256"] = checkpoint
            if self.parent_id:
                tags["mlflow.parentRunId"] = self.parent_id
            run = self.client.create_run(self.experiment_id, self.start["time"], tags, self.start["name"])
            self.run_id = run.info.run_id
        if self.start["system_metrics"]:
            from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

            self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.uri)
            self.monitor.start()

    def _send(self, entry: dict) -> None:
        if "start" in entry:
            from mlflow.entities import Param

            params = [Param(name, str(value)) for name, value in entry["start"]["params"].items()]
            self.client.log_batch(self.run_id, params=params)
        elif "preview" in entry:
            path = self.journal.outbox / entry["preview"]
            if path.exists():  # or it was shipped before this process resumed the run
                self._log_image(path, entry["step"], entry["time"])
                shutil.rmtree(path.parent)
        elif "artifact" in entry:
            path = self.journal.outbox / entry["artifact"]
            if path.exists():
                self.client.log_artifact(self.run_id, str(path), entry["folder"])
                shutil.rmtree(path.parent)
        elif "tags" in entry:
            for name, value in entry["tags"].items():
                self.client.set_tag(self.run_id, name, value)
        elif "dataset" in entry:
            self._log_dataset(**entry["dataset"])
        elif "best_evaluation" in entry:
            self._log_best_evaluation(entry["best_evaluation"], entry["time"])
        elif "end" in entry:
            if self.monitor:
                self.monitor.finish()
                self.monitor.collect_metrics()  # or a run shorter than MLflow's interval of 10 s would have none
                self.monitor.publish_metrics(self.monitor.aggregate_metrics())
                self.monitor.mlflow_logger.flush()
                self.monitor = None
            self.client.set_terminated(self.run_id, entry["end"], entry["time"])

    def _find(self, condition: str) -> list:
        return self.client.search_runs([self.experiment_id], condition, order_by=["attributes.start_time DESC"], max_results=1)

    def _log_dataset(self, name: str, digest: str, source: str, profile: dict, context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def _log_image(self, path: Path, step: int, timestamp: int) -> None:
        """MLflow gives every image another name: one that is there by its step and time is not logged again."""
        from PIL import Image

        there = re.compile(rf"step\W{step}\Wtimestamp\W{timestamp}\W.*compressed")  # the second of its two files
        if not any(there.search(file.path) for file in self.client.list_artifacts(self.run_id, "images")):
            with Image.open(path) as image:
                self.client.log_image(self.run_id, image, key="samples", step=step, timestamp=timestamp, synchronous=True)

    def _log_best_evaluation(self, values: dict[str, float], timestamp: int) -> None:
        """Put `values` on the train run unless it carries better ones.

        Better is a lower FID at an equal number of samples under the same evaluator; more samples are always better
        evidence than fewer, and a new evaluator replaces the old one's figures.
        """
        if self.parent_id is None:
            return
        best = self.client.get_run(self.parent_id).data.tags.get("best_evaluation")
        if best == self.run_id:
            return  # an earlier process that shipped this journal put them there
        if theirs := self._find(f"attributes.run_id = '{best}'"):  # or it was deleted since
            theirs, mine = theirs[0], self.client.get_run(self.run_id)
            same_evaluator = theirs.data.tags["evaluator_sha256"] == mine.data.tags["evaluator_sha256"]
            their_rank = (-int(theirs.data.tags["samples"]), theirs.data.metrics["eval/fid"])
            if same_evaluator and their_rank <= (-int(mine.data.tags["samples"]), values["eval/fid"]):
                return
        from mlflow.entities import Metric

        self.client.log_batch(self.parent_id, metrics=[Metric(name, value, timestamp, 0) for name, value in values.items()])
        self.client.set_tag(self.parent_id, "best_evaluation", self.run_id)


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
    name = os.environ.get("DVC_EXP_NAME")
    start = {
        "stage": stage,
        "name": f"{stage}-{name}" if name else stage,
        "params": _flatten(params),
        "tags": {**_git_tags(), **_version_tags(), "device": device, "dvc_exp_name": name or ""},
        "checkpoint_sha256": checkpoint_sha256,
        "system_metrics": stage == "train",
    }
    run = Run(root, folder, start)
    try:
        run.begin(required)
        yield run
    except BaseException as error:
        run.finish("FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    run.finish("FINISHED")


def ship(folder: Path, root: Path) -> str:
    """Send the store the whole journal in `folder`, once more what it has already; the store's address.

    The folder is removed unless a run can go on in it. Raises UserError where that run is under way, or the store away.
    """
    with hold(folder):
        journal = Journal(folder)
        start = next((e["start"] for e in journal.entries if "start" in e), None)
        if start is None:
            raise UserError(f"{journal.path}: holds no run")
        store, queue = Store(root, journal, {**start, "system_metrics": False}), deque(journal.entries)
        try:
            store.ship(queue, len(queue))
        except Exception as error:
            raise UserError(f"MLflow at {store.uri}: {_root_cause(error)}") from None
        journal.file.close()
        if journal.entries[-1].get("end") == "FINISHED" and not list(folder.glob("*.pt")):
            shutil.rmtree(folder)
    return store.uri


def _leading_metrics(queue: deque[dict], limit: int) -> list[dict]:
    entries = queue.copy()  # in one go: the program may append while these are looked at
    return list(takewhile(lambda entry: "metric" in entry, islice(entries, limit)))


def _flatten(params: dict, prefix: str = "") -> dict[str, object]:
    flat: dict[str, object] = {}
    for name, value in params.items():
        flat.update(_flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value})
    return flat


def _git_tags() -> dict[str, str]:
    def git(*arguments: str) -> str | None:
        try:
            return subprocess.run(["git", *arguments], capture_output=True, text=True, check=True, timeout=10).stdout.strip()
        except (OSError, subprocess.SubprocessError):
            return None

    commit, status = git("rev-parse", "HEAD"), git("status", "--porcelain", "--untracked-files=no")
    return {
        "mlflow.source.git.commit": commit or "unknown",
        "git_dirty": "unknown" if status is None else str(bool(status)).lower(),
    }


def _version_tags() -> dict[str, str]:
    import torch

    return {
        "mlflow.source.name": " ".join(sys.argv),
        "mlflow.source.type": "LOCAL",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
    }


def _now() -> int:
    return time.time_ns() // 1_000_000


def _root_cause(error: BaseException) -> str:
    """What lies at the root of an error, on one line."""
    while deeper := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = deeper
    lines = (getattr(error, "strerror", None) or str(error)).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
