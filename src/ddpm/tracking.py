"""Everything that knows MLflow: a journal on disk, and a thread that ships it.

The program only appends to the journal and never waits for the store. A daemon thread sends what was appended, in
batches; what fails stays queued and is tried again. A run that is interrupted and resumed appends to the same journal
and goes on in the same MLflow run: a step that it computes again keeps its journalled value and time, and since MLflow
keys metrics by both, shipping the whole journal once more makes no doubles.

`python src/ddpm/tracking.py FOLDER` ships a journal that was left behind because the store could not be reached.
"""

import json
import logging
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice, takewhile
from pathlib import Path

EXPERIMENT = "fashion-mnist-ddpm"  # MLFLOW_EXPERIMENT_NAME names another
RETRY_SECONDS = 2
SHIP_SECONDS = 1  # between two shipments, so that they are batches
EXIT_SECONDS = 10  # how long the end waits for a store that is in trouble
SLOW_SECONDS = 120  # and for one that is only slow, such as a database that is being created
REFUSED = ("INVALID_PARAMETER_VALUE", "BAD_REQUEST", "RESOURCE_DOES_NOT_EXIST")  # asking again would change nothing
MAX_BATCH = 1000  # metrics that MLflow takes in one call

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")
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


class Journal:
    """The lines of one MLflow run, in a folder of its own with the files that are still to be shipped."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self.outbox = folder / "outbox"
        self.outbox.mkdir(parents=True, exist_ok=True)
        text = self.path.read_text() if self.path.exists() else ""
        whole = text[: text.rfind("\n") + 1]  # a torn last line was never a record
        self.entries = [json.loads(line) for line in whole.splitlines()]
        if whole != text:
            self.path.write_text(whole)
        self.file = self.path.open("a", buffering=1)

    def append(self, entry: dict) -> None:
        self.file.write(json.dumps(entry) + "\n")

    def deposit(self, path: Path) -> str:
        """Copy a file, under its own name, into a new folder of the outbox; it leaves it when it has been shipped."""
        folder = uuid.uuid4().hex[:8]
        hidden = self.outbox / f".{folder}"
        hidden.mkdir()
        shutil.copyfile(path, hidden / path.name)
        hidden.rename(self.outbox / folder)
        return f"{folder}/{path.name}"


class Run:
    """One MLflow run. Its methods return at once; `finish` waits for the store, but not for ever."""

    def __init__(self, root: Path, folder: Path, start: dict):
        self.root, self.journal = root, Journal(folder)
        self.queue = deque(e for e in self.journal.entries if "end" not in e)  # it has not ended after all
        self.logged = {(e.get("metric", "preview"), e["step"]) for e in self.queue if "step" in e}
        self.shipped = False
        self.finishing = threading.Event()
        if not self.journal.entries:
            self._append({"start": {**start, "journal": uuid.uuid4().hex, "time": _now()}})
        self.store = Store(root, self.journal, next(e["start"] for e in self.queue if "start" in e))
        self.thread = threading.Thread(target=self._ship, daemon=True)
        self.thread.start()

    def metrics(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            if (name, step) not in self.logged:
                self.logged.add((name, step))
                self._append({"metric": name, "value": value, "step": step, "time": _now()})

    def preview(self, step: int, image: Path) -> None:
        """An image that the UI shows under a slider of steps."""
        if ("preview", step) not in self.logged:
            self.logged.add(("preview", step))
            self._append({"preview": self.journal.deposit(image), "step": step, "time": _now()})

    def artifact(self, path: Path, folder: str | None = None) -> None:
        self._append({"artifact": self.journal.deposit(path), "folder": folder})

    def tags(self, values: dict[str, object]) -> None:
        self._append({"tags": {name: str(value) for name, value in values.items()}})

    def dataset(self, name: str, digest: str, source: str, profile: dict, context: str) -> None:
        self._append({"dataset": {"name": name, "digest": digest, "source": source, "profile": profile, "context": context}})

    def best_evaluation(self, values: dict[str, float]) -> None:
        """Let the train run that this run evaluates carry these metrics, if they are its best yet."""
        self._append({"best_evaluation": values})

    def finish(self, status: str) -> None:
        """End the run. What the store has not taken by then is kept, and a printed command ships it."""
        self._append({"end": status, "time": _now()})
        self.finishing.set()
        began = time.monotonic()
        while self.thread.is_alive() and time.monotonic() - began < self.store.patience:
            self.thread.join(0.1)
        self.journal.file.close()
        resumable = _is_resumable(self.store.start["stage"], status)
        if self.shipped and not resumable:
            shutil.rmtree(self.journal.folder)
        elif not self.shipped:
            folder = self.journal.folder
            if not resumable:  # the next run of this configuration is a new one
                folder = folder.rename(self.root / ".resume" / f"unshipped-{self.store.start['journal'][:12]}")
            print(
                f"warning: MLflow at {self.store.uri} has not taken all of this run ({self.store.problem or 'no answer'}); "
                f"it is kept, and `python src/ddpm/tracking.py {folder}` ships it",
                file=sys.stderr,
            )

    def _append(self, entry: dict) -> None:
        self.journal.append(entry)
        self.queue.append(entry)

    def _ship(self) -> None:
        while True:
            try:
                self.store.ship(self.queue)
                if self.finishing.is_set() and not self.queue:
                    self.shipped = True
                    return
                self.finishing.wait(SHIP_SECONDS)
            except ImportError as error:  # a machine without MLflow: the journal is shipped from another
                self.store.problem = _first_line(error)
                return
            except Exception as error:  # whatever the store's trouble is, the run goes on and the thread tries again
                if self.store.problem is None:
                    print(f"warning: MLflow at {self.store.uri}: {_first_line(error)}; still trying", file=sys.stderr)
                self.store.problem = _first_line(error)
                time.sleep(RETRY_SECONDS)


class Store:
    """The MLflow store's end of a run: creates it, or finds it again, and sends it the journal's entries."""

    def __init__(self, root: Path, journal: Journal, start: dict):
        self.root, self.journal, self.start = root, journal, start
        self.uri = tracking_uri(root)
        self.is_local = "://" not in self.uri or self.uri.startswith(("sqlite:", "file:"))
        self.problem: str | None = None  # the last one, while it lasts
        self.client = self.run_id = self.parent_id = self.monitor = None

    @property
    def patience(self) -> int:
        """Seconds to wait for it at the end."""
        return EXIT_SECONDS if self.problem or not self.is_local else SLOW_SECONDS

    def ship(self, queue: deque[dict]) -> None:
        """Send the queue's entries in order; each leaves the queue when the store has it."""
        if self.run_id is None:
            self._open()
        from mlflow.entities import Metric
        from mlflow.exceptions import MlflowException

        while queue:
            batch = [Metric(e["metric"], e["value"], e["time"], e["step"]) for e in _leading_metrics(queue)]
            if batch:
                self.client.log_batch(self.run_id, metrics=batch)
            else:
                try:
                    self._send(queue[0])
                except MlflowException as error:
                    if error.error_code not in REFUSED:
                        raise
                    print(
                        f"warning: MLflow at {self.uri} refused to log {next(iter(queue[0]))}: {_first_line(error)}",
                        file=sys.stderr,
                    )
            for _ in range(max(len(batch), 1)):
                queue.popleft()
        self.problem = None

    def _open(self) -> None:
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
                from PIL import Image

                with Image.open(path) as image:
                    self.client.log_image(
                        self.run_id, image, key="samples", step=entry["step"], timestamp=entry["time"], synchronous=True
                    )
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
            self._log_best_evaluation(entry["best_evaluation"])
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

    def _log_best_evaluation(self, values: dict[str, float]) -> None:
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

        self.client.log_batch(self.parent_id, metrics=[Metric(name, value, _now(), 0) for name, value in values.items()])
        self.client.set_tag(self.parent_id, "best_evaluation", self.run_id)


@contextmanager
def start_run(
    stage: str, params: dict, root: Path, folder: Path | None = None, checkpoint_sha256: str | None = None, device: str = "cpu"
) -> Iterator[Run]:
    """The MLflow run of a stage, FINISHED, FAILED or KILLED by how the block ends.

    `folder` keeps the journal (by default one of its own under `root`). With `checkpoint_sha256` the run becomes a child
    of the newest finished train run that made that checkpoint, if the store has one.
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
    run = Run(root, folder or root / ".resume" / f"{stage}-{uuid.uuid4().hex[:12]}", start)
    if on_main := threading.current_thread() is threading.main_thread():
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # or the run would stay RUNNING for ever
    try:
        yield run
    except BaseException as error:
        failed = isinstance(error, Exception) and not hasattr(error, "exit_status")
        run.finish("FAILED" if failed else "KILLED")
        raise
    else:
        run.finish("FINISHED")
    finally:
        if on_main:
            signal.signal(signal.SIGTERM, before)


def _is_resumable(stage: str, status: str | None) -> bool:
    """Whether the journal must stay: a training that goes on appends to it."""
    return stage == "train" and status != "FINISHED"


def _leading_metrics(queue: deque[dict]) -> list[dict]:
    entries = queue.copy()  # in one go: the program may append while these are looked at
    return list(takewhile(lambda entry: "metric" in entry, islice(entries, MAX_BATCH)))


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


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "journal.jsonl").is_file():
        sys.exit("usage: python src/ddpm/tracking.py FOLDER, a folder under .resume/ that holds a journal.jsonl")
    folder = Path(sys.argv[1]).resolve()
    journal = Journal(folder)
    start = next(e["start"] for e in journal.entries if "start" in e)
    root = next((parent.parent for parent in folder.parents if parent.name == ".resume"), folder.parent)
    store = Store(root, journal, {**start, "system_metrics": False})
    try:
        store.ship(deque(journal.entries))
    except Exception as error:
        sys.exit(f"error: MLflow at {store.uri}: {_first_line(error)}")
    journal.file.close()
    status = next((e["end"] for e in reversed(journal.entries) if "end" in e), None)
    if not _is_resumable(start["stage"], status):
        shutil.rmtree(folder)
    print(f"shipped to MLflow at {store.uri}")


if __name__ == "__main__":
    main()
