"""A run in MLflow's store, and what MLflow gets there for each entry of the run's journal."""

import json
import re
import shutil
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock
from PIL import Image

from ddpm.paths import CACHE
from ddpm.tracking.client import ARTIFACTS, local_folder
from ddpm.tracking.connection import Answer, answer, model_name
from ddpm.tracking.journal import Entry
from ddpm.tracking.logged_model import complete_logged_model, logged_models, without_metrics
from ddpm.tracking.queries import newest_run
from ddpm.tracking.ranking import Evaluation, is_better, is_comparable
from ddpm.tracking.registry import register, rounded

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor


FILES = ("preview", "artifact", "register")  # the kinds of entries that have a file in the outbox


@dataclass
class StoredRun:
    """Sends entries to one run. An entry that is sent again changes nothing."""

    client: "MlflowClient"
    root: Path  # of the repository, whose `.cache` has the locks
    outbox: Path
    data_set: str
    experiment_id: str
    run_id: str
    artifact_uri: str
    parent_id: str | None  # the training that made the checkpoint which this run samples or evaluates
    monitor: "SystemMetricsMonitor | None" = None

    def start_monitor(self) -> None:
        """Log the load of the machine until the run ends, from a thread of MLflow's."""
        from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor

        self.monitor = SystemMetricsMonitor(self.run_id, resume_logging=True, tracking_uri=self.client.tracking_uri)
        self.monitor.start()

    def log(self, entries: list[Entry]) -> None:
        """Log entries: metrics, of which MLflow takes 1000 in a call, or a single other one."""
        entry = entries[0]
        if "metric" in entry:
            self._log_metrics(entries)
        elif "start" in entry:
            self._log_params(entry["start"]["params"])
        elif "tags" in entry:
            self._log_tags(entry["tags"])
        elif path := self._file(entry):
            if path.exists():  # else it was sent before this process resumed the run
                self._check_location()
                self._log_file(entry, path)
                self.discard(entry)
        elif "dataset" in entry:
            self._log_dataset(**entry["dataset"])
        elif "model" in entry:
            self._log_model(**entry["model"])
        elif "best_evaluation" in entry:
            self._log_best_evaluation(entry["best_evaluation"], entry["time"])
        elif "end" in entry:
            with suppress(Exception):  # the load of the machine is not worth a run without an end
                self._finish_monitor()
            self.client.set_terminated(self.run_id, entry["end"], entry["time"])

    def discard(self, entry: Entry) -> None:
        """Remove the file of an entry that has one from the outbox."""
        if path := self._file(entry):
            shutil.rmtree(path.parent)

    def is_deleted(self) -> bool:
        """Whether somebody has deleted the run, or its experiment."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_run(self.run_id).info.lifecycle_stage == "deleted"
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
            return True

    def _file(self, entry: Entry) -> Path | None:
        """Where the file of an entry waits, if the entry has one."""
        return next((self.outbox / entry[kind] for kind in FILES if kind in entry), None)

    def _check_location(self) -> None:
        """Raise FileNotFoundError if files would go to a folder of a repository that isn't there any more.

        MLflow would create it again, where nobody looks for it.
        """
        folder = local_folder(self.artifact_uri)  # repository/mlartifacts/experiment/run/artifacts
        if folder and folder.parts[-4:-3] == (ARTIFACTS,) and not folder.parents[3].exists():
            raise FileNotFoundError(f"{folder.parents[3]}: this folder, which had the experiment's artifacts, doesn't exist")

    def _log_metrics(self, entries: list[Entry]) -> None:
        from mlflow.entities import Metric

        metrics = [Metric(entry["metric"], entry["value"], entry["time"], entry["step"]) for entry in entries]
        self._send_parts(lambda some: self.client.log_batch(self.run_id, metrics=some), metrics)

    def _log_params(self, params: dict[str, Any]) -> None:
        from mlflow.entities import Param

        as_text = [Param(name, str(value)) for name, value in params.items()]
        self._send_parts(lambda some: self.client.log_batch(self.run_id, params=some), as_text)

    def _log_tags(self, tags: dict[str, Any]) -> None:
        from mlflow.entities import RunTag

        as_text = [RunTag(name, str(value)) for name, value in tags.items()]
        self._send_parts(lambda some: self.client.log_batch(self.run_id, tags=some), as_text)

    def _log_file(self, entry: Entry, path: Path) -> None:
        if "preview" in entry:
            self._log_image(path, entry["step"], entry["time"])
        elif "artifact" in entry:
            self.client.log_artifact(self.run_id, str(path), entry["folder"])
        else:
            with FileLock(self.root / CACHE / "registry.lock"):  # else two evaluations of one checkpoint make two versions
                evaluation = self.client.get_run(self.run_id)
                owner = self.client.get_run(self.parent_id) if self.parent_id else evaluation
                register(self.client, self.data_set, owner, evaluation, path, entry["sampling"])

    def _log_image(self, path: Path, step: int, timestamp: int) -> None:
        """MLflow would store an image again under another name, so look first for one with this step and time."""
        from mlflow.artifacts import list_artifacts  # by address: by run it asks for logged models, which old servers lack

        stored = re.compile(rf"step\W{step}\Wtimestamp\W{timestamp}\W.*compressed")  # the second of the two files per image
        images = list_artifacts(f"{self.artifact_uri}/images", tracking_uri=self.client.tracking_uri)
        if not any(stored.search(file.path) for file in images):
            with Image.open(path) as image:
                self.client.log_image(self.run_id, image, key="samples", step=step, timestamp=timestamp, synchronous=True)

    def _log_dataset(self, name: str, digest: str, source: str, profile: dict[str, Any], context: str) -> None:
        from mlflow.entities import Dataset, DatasetInput, InputTag

        dataset = Dataset(name, digest, "local", json.dumps({"uri": source}), profile=json.dumps(profile))
        self.client.log_inputs(self.run_id, [DatasetInput(dataset, [InputTag("mlflow.data.context", context)])])

    def _log_model(self, params: dict[str, Any], tags: dict[str, Any]) -> None:
        """Make the model that this run trained one of MLflow's logged models, which its tab Models lists."""
        as_text = [{name: str(value) for name, value in values.items()} for values in (params, tags)]
        complete_logged_model(self.client, self.client.get_run(self.run_id), model_name(self.data_set), *as_text)

    def _log_best_evaluation(self, values: dict[str, float], timestamp: int) -> None:
        """Copy the metrics of this evaluation to the training's run and its logged model, unless those have better ones.

        Figures of another data set or evaluator, which don't compare, are replaced. The copies have four significant digits.
        """
        if self.parent_id is None:
            return
        training, evaluation = self.client.get_run(self.parent_id), self.client.get_run(self.run_id)
        best_id = training.data.tags.get("best_evaluation")
        if best_id == self.run_id:  # an earlier process with this journal copied them
            return
        if best := newest_run(self.client, self.experiment_id, f"attributes.run_id = '{best_id}'"):  # None if it was deleted
            old = Evaluation.from_tags(best.data.metrics["eval/fid"], best.data.tags)
            new = Evaluation.from_tags(values["eval/fid"], evaluation.data.tags)
            if is_comparable(new, old) and not is_better(new, old):
                return
        from mlflow.entities import Metric

        inputs = evaluation.inputs.dataset_inputs if evaluation.inputs else []
        data = (inputs[0].dataset.name, inputs[0].dataset.digest) if inputs else ()
        old_models = logged_models(self.client, training)
        model = without_metrics(self.client, training, old_models) if old_models else None
        model_id = model.model_id if model else None
        metrics = [Metric(name, rounded(value), timestamp, 0, model_id, *data) for name, value in values.items()]
        self.client.log_batch(self.parent_id, metrics=metrics)
        for old_model in old_models:
            if old_model.model_id != model_id:
                self.client.delete_logged_model(old_model.model_id)
        self.client.set_tag(self.parent_id, "best_evaluation", self.run_id)

    def _finish_monitor(self) -> None:
        if monitor := self.monitor:
            self.monitor = None
            monitor.finish()
            monitor.collect_metrics()  # else a run that is shorter than MLflow's interval of 10 s would have none
            monitor.publish_metrics(monitor.aggregate_metrics())
            monitor.mlflow_logger.flush()

    def _send_parts(self, send: Callable[[list[Any]], object], items: list[Any]) -> None:
        """Send all items in one call; if that is refused, in halves, so that every item arrives except the refused ones.

        Raises the error of the first refused one.
        """
        try:
            send(items)
        except Exception as error:
            if answer(error) is not Answer.REFUSED or len(items) == 1 or self.is_deleted():
                raise
            half, refusals = len(items) // 2, []
            for part in (items[:half], items[half:]):
                try:
                    self._send_parts(send, part)
                except Exception as refusal:
                    if answer(refusal) is not Answer.REFUSED:
                        raise
                    refusals.append(refusal)
            if refusals:
                raise refusals[0] from None
