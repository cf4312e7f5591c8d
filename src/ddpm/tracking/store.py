"""MLflow's store: where it is, and what is sent there and looked up."""

import json
import re
import shutil
import sys
import threading
import time
from collections import deque
from itertools import islice, takewhile
from pathlib import Path

from ddpm.tracking.connection import REFUSED, experiment_name, quiet, tracking_uri, without_password
from ddpm.tracking.journal import Journal

EXIT_SECONDS = 10  # how long the end waits for a store that is in trouble
SLOW_SECONDS = 120  # and for one that is only slow, such as a database that is being created
MAX_BATCH = 1000  # metrics that MLflow takes in one call


class Store:
    """The MLflow store's end of a run: creates it, or finds it again, and sends it the journal's entries."""

    def __init__(self, root: Path, journal: Journal, start: dict):
        self.root, self.journal, self.start = root, journal, start
        self.uri = tracking_uri(root)
        self.address = without_password(self.uri)
        self.problem: str | None = None  # the last one, while it lasts
        self.problem_since = 0.0
        self.given_up = False
        self.client = self.run_id = self.parent_id = self.monitor = None

    def in_trouble(self, problem: str) -> None:
        if self.problem is None:
            print(
                f"warning: MLflow at {self.address}: {problem}; the run goes on, and MLflow gets everything once it answers",
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
                    print(f"warning: MLflow at {self.address} refused to log {next(iter(queue[0]))}: {said}", file=sys.stderr)
            for _ in range(max(len(batch), 1)):
                queue.popleft()
                count -= 1
        self.problem = None

    def open(self) -> None:
        """Connect, and create the run unless an earlier process with this journal already did."""
        import mlflow
        from filelock import FileLock

        quiet()
        mlflow.set_tracking_uri(self.uri)
        (self.root / ".cache").mkdir(exist_ok=True)
        with FileLock(self.root / ".cache" / "mlflow.lock"):  # two processes that create one database at once crash
            self.client = mlflow.MlflowClient(self.uri, self.uri)
            self.experiment_id = self._experiment(experiment_name())

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

    def _experiment(self, name: str) -> str:
        from mlflow.exceptions import MlflowException

        if experiment := self.client.get_experiment_by_name(name):
            return experiment.experiment_id
        served = self.uri.startswith(("http:", "https:", "databricks"))  # by what has a place for artifacts
        location = None if served else (self.root / "mlartifacts" / name).as_uri()
        try:
            return self.client.create_experiment(name, artifact_location=location)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":  # another machine was quicker
                raise
            return self.client.get_experiment_by_name(name).experiment_id

    def _send(self, entry: dict) -> None:
        if "start" in entry:
            from mlflow.entities import Param

            params = [Param(name, str(value)) for name, value in entry["start"]["params"].items()]
            self.client.log_batch(self.run_id, params=params)
        elif deposited := entry.get("preview") or entry.get("artifact") or entry.get("register"):
            path = self.journal.outbox / deposited
            if path.exists():  # or it was shipped before this process resumed the run
                self._send_file(entry, path)
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

    def _send_file(self, entry: dict, path: Path) -> None:
        if "preview" in entry:
            self._log_image(path, entry["step"], entry["time"])
        elif "artifact" in entry:
            self.client.log_artifact(self.run_id, str(path), entry["folder"])
        else:
            self._register(path, entry["sampling"])

    def _register(self, checkpoint: Path, sampling: dict) -> None:
        from filelock import FileLock

        from ddpm.tracking.registry import register

        with FileLock(self.root / ".cache" / "registry.lock"):  # two evaluations of one checkpoint make one version
            register(self.client, self.parent_id or self.run_id, self.client.get_run(self.run_id), checkpoint, sampling)

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


def _leading_metrics(queue: deque[dict], limit: int) -> list[dict]:
    entries = queue.copy()  # in one go: the program may append while these are looked at
    return list(takewhile(lambda entry: "metric" in entry, islice(entries, limit)))
