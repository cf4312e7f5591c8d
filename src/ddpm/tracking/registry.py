"""MLflow's model registry: one version per evaluated checkpoint, and the alias `champion` for the best version."""

import json
import tempfile
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ddpm.errors import UserError
from ddpm.files import write_atomic
from ddpm.params import FASHION_MNIST, SampleParams
from ddpm.paths import CACHE, LIBRARY, MODEL, TRACKING
from ddpm.tracking.client import connect
from ddpm.tracking.connection import model_name, root_cause, store_exists, tracking_uri, without_password
from ddpm.tracking.logged_model import logged_models
from ddpm.tracking.ranking import Evaluation, is_better

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run
    from mlflow.entities.model_registry import ModelVersion

CHAMPION = "champion"
VERSIONS = "mlflow.modelVersions"  # MLflow's tag of a logged model, which its pages show as a link
DESCRIPTION = """\
Diffusion models of {data_set}. Each version is a trained model with its best evaluation. `make serve` serves the `champion`:
that alias moves to a version with a lower FID, of at least as many samples, by the same evaluator.
"""
FIGURES = {  # what a version's summary shows: metric, its name there, and the same metric of real images
    "fid": ("FID, less is better", "fid_floor"),
    "c2st_auc": ("two-sample AUC, 0.5 is best", "c2st_auc_real"),
    "kid": ("KID, less is better", "kid_floor"),
    "precision": ("precision", "precision_real"),
    "recall": ("recall", "recall_real"),
    "class_accuracy": ("class accuracy", "class_accuracy_real"),
}
ADDED = {"guidance_interval": None}  # what evaluations before 2026-11-29 didn't record
CHECKPOINT = MODEL.name  # among the artifacts of a version
SERVING_NEEDS = ("mlflow", "numpy", "pillow", "psutil", "pydantic", "torch")  # packages that a served model imports
SERVE_A_FILE = f"to serve a file instead: `python src/serve.py {MODEL}`"


def register(
    client: "MlflowClient", data_set: str, owner: "Run", evaluation: "Run", checkpoint: Path, sampling: dict[str, Any]
) -> None:
    """Make the checkpoint a version of the data set's model, with its best evaluation; the champion if it beats the current one.

    The version belongs to the run `owner`. A checkpoint that already has a version keeps it, and a call that was interrupted is
    completed by the next one.
    """
    from mlflow.exceptions import MlflowException

    model = model_name(data_set)
    try:
        client.create_registered_model(model, description=DESCRIPTION.format(data_set=data_set))
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    sampling = ADDED | sampling  # it may come from the journal of an earlier version
    tags = _tags(evaluation, sampling)
    version = _version(client, model, tags["checkpoint_sha256"])
    number = version.version if version else _new_version(client, model, owner, checkpoint, sampling, tags)
    if not version or version.tags.get("evaluation") == tags["evaluation"] or _beats(tags, version.tags):
        for name, value in tags.items():
            client.set_model_version_tag(model, number, name, value)
        client.update_model_version(model, number, _summary(evaluation, sampling))
    for logged_model in logged_models(client, owner):
        client.set_logged_model_tags(logged_model.model_id, {VERSIONS: json.dumps([{"name": model, "version": number}])})
    best = client.get_registered_model(model).aliases.get(CHAMPION)
    if best is None or (str(best) != str(number) and _beats(tags, client.get_model_version(model, best).tags)):
        client.set_registered_model_alias(model, CHAMPION, number)


def rounded(value: float) -> float:
    """A metric with four significant digits, which is more than it is worth."""
    return float(f"{value:.4g}")


def _summary(evaluation: "Run", sampling: dict[str, Any]) -> str:
    """Markdown: the figures of an evaluation beside those of real images, and where they are from."""
    metrics, tags = evaluation.data.metrics, evaluation.data.tags
    figures = []
    for name, (label, floor) in FIGURES.items():
        if (value := metrics.get(f"eval/{name}")) is not None:
            real = metrics.get(f"eval/{floor}")
            figures.append(f"| {label} | {value:.4g} | {'' if real is None else f'{real:.4g}'} |")
    return "\n".join(
        (
            f"FID {rounded(metrics['eval/fid'])} of {tags['samples']} samples "
            f"({sampling['sampler']}, {sampling['steps']} steps, guidance {sampling['guidance_scale']})",
            "",
            "| | samples | real images |",
            "|---|---|---|",
            *figures,
            "",
            f"Measured by the run `{evaluation.info.run_name}`, {evaluation.info.run_id}; trained by the source run.",
        )
    )


def _tags(evaluation: "Run", sampling: dict[str, Any]) -> dict[str, str]:
    """The tags of a version with this evaluation. `evaluation` is written first, so that a repeated call
    recognises the version that an interrupted call left incomplete.
    """
    tags = evaluation.data.tags
    return {
        "evaluation": evaluation.info.run_id,
        **{name: tags[name] for name in ("checkpoint_sha256", "evaluator_sha256", "samples")},
        **{name: tags[name] for name in ("data_sha256",) if name in tags},  # evaluations of earlier versions lack it
        "fid": str(rounded(evaluation.data.metrics["eval/fid"])),
        "sampling": json.dumps(sampling),
    }


def _beats(tags: dict[str, str], other: dict[str, str]) -> bool:
    """Whether a version with `tags` is better. False if the other one lacks our tags, because somebody registered it by hand."""
    try:
        old = Evaluation.from_tags(rounded(float(other["fid"])), other)  # earlier versions didn't round it
    except (KeyError, ValueError):
        return False
    return is_better(Evaluation.from_tags(float(tags["fid"]), tags), old)


def _version(client: "MlflowClient", model: str, checkpoint_sha256: str) -> "ModelVersion | None":
    """The version of a checkpoint. One whose run was deleted, and the model with it, is removed from the registry."""
    from mlflow.exceptions import MlflowException

    for version in client.search_model_versions(f"name = '{model}' and tags.checkpoint_sha256 = '{checkpoint_sha256}'"):
        try:
            if version.run_id and client.get_run(version.run_id).info.lifecycle_stage == "active":
                return version
        except MlflowException as error:
            if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                raise
        client.delete_model_version(model, version.version)
    return None


def _new_version(
    client: "MlflowClient", model: str, owner: "Run", checkpoint: Path, sampling: dict[str, Any], tags: dict[str, str]
) -> str:
    """Register a version; its number. What is needed to serve it is stored with the run: this library, weights and sampling."""
    import mlflow

    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            Path(folder) / "generator",
            python_model=str(TRACKING / "served_model.py"),
            code_paths=[str(LIBRARY)],
            artifacts={"checkpoint": str(checkpoint)},
            model_config=sampling,
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in SERVING_NEEDS],
        )
        client.log_artifacts(owner.info.run_id, str(Path(folder) / "generator"), "generator")
    source = f"{owner.info.artifact_uri}/generator"
    return client.create_model_version(model, source, owner.info.run_id, tags=tags).version


def champion(root: Path, data_set: str = FASHION_MNIST) -> tuple[str, Path, SampleParams] | None:
    """A data set's champion: its name, a local copy of its checkpoint, and the sampling it was evaluated with; None without one.

    Raises UserError if MLflow is unreachable or the model can't be downloaded.
    """
    uri, model = tracking_uri(root), model_name(data_set)
    if not store_exists(uri):
        return None
    try:
        version = connect(root).get_model_version_by_alias(model, CHAMPION)
    except UserError:
        raise
    except Exception as error:
        if getattr(error, "error_code", None) in (
            "RESOURCE_DOES_NOT_EXIST",
            "INVALID_PARAMETER_VALUE",
        ):  # none was ever registered
            return None
        raise UserError(f"MLflow at {without_password(uri)}: {root_cause(error)}; {SERVE_A_FILE}") from None
    name = f"{model}, version {version.version}"
    try:
        sampling = SampleParams.model_validate(ADDED | json.loads(version.tags["sampling"]))
    except (KeyError, TypeError, ValueError):
        raise UserError(f"the champion ({name}) was not registered by this version of the pipeline; {SERVE_A_FILE}") from None
    return name, _downloaded_checkpoint(root, uri, version), sampling


def _downloaded_checkpoint(root: Path, uri: str, version: "ModelVersion") -> Path:
    """A copy of the version's weights in `.cache`. Raises UserError if it can't be downloaded."""
    import mlflow

    path = root / CACHE / "champion" / f"{version.tags.get('checkpoint_sha256')}.pth"
    if not path.exists():
        file = f"{version.source}/artifacts/{CHECKPOINT}"
        try:
            with tempfile.TemporaryDirectory() as folder:
                copy = mlflow.artifacts.download_artifacts(file, dst_path=folder, tracking_uri=uri)
                write_atomic(path, Path(copy).read_bytes())
        except Exception as error:
            raise UserError(f"MLflow at {without_password(uri)}: {file}: {root_cause(error)}; {SERVE_A_FILE}") from None
    return path
