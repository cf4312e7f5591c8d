"""MLflow's registry: a version for each checkpoint, and the alias `champion` for the best of them."""

import json
import tempfile
from importlib import metadata
from pathlib import Path

from ddpm.errors import UserError
from ddpm.files import write_atomic
from ddpm.params import SampleParams
from ddpm.tracking.connection import REFUSED, quiet, root_cause, store_exists, tracking_uri, without_password

MODEL = "fashion-ddpm"
CHAMPION = "champion"
NEEDED = ("mlflow", "numpy", "pillow", "psutil", "pydantic", "pyyaml", "torch", "tqdm")  # by what serves it


def register(client, owner: str, evaluation, checkpoint: Path, sampling: dict) -> None:
    """Let the checkpoint be a version of the run `owner`, once, with its best evaluation; the champion if it is better.

    Better is a lower FID by the same evaluator at as many samples or more: fewer samples raise it.
    """
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(MODEL, description="Garments of Fashion-MNIST, by a diffusion model")
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    tags = {"evaluation": evaluation.info.run_id}  # the first: who is interrupted knows by it what to complete
    tags |= {name: evaluation.data.tags[name] for name in ("checkpoint_sha256", "evaluator_sha256", "samples")}
    tags |= {"fid": str(evaluation.data.metrics["eval/fid"]), "sampling": json.dumps(sampling)}
    version = _version(client, tags["checkpoint_sha256"])
    number = version.version if version else _new_version(client, owner, checkpoint, sampling, tags)
    if not version or version.tags.get("evaluation") == tags["evaluation"] or _better(tags, version.tags):
        for name, value in tags.items():
            client.set_model_version_tag(MODEL, number, name, value)
        described = f"FID {float(tags['fid']):.4g} of {tags['samples']} samples; {evaluation.info.run_name}"
        client.update_model_version(MODEL, number, described)
    best = client.get_registered_model(MODEL).aliases.get(CHAMPION)
    if best is None or (str(best) != str(number) and _better(tags, client.get_model_version(MODEL, best).tags)):
        client.set_registered_model_alias(MODEL, CHAMPION, number)


def _better(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    """False too where `theirs` has none of our tags: somebody registered it by hand."""
    same_evaluator = mine["evaluator_sha256"] == theirs.get("evaluator_sha256")
    return same_evaluator and int(mine["samples"]) >= int(theirs["samples"]) and float(mine["fid"]) < float(theirs["fid"])


def _version(client, checkpoint_sha256: str):
    """The checkpoint's version, or None; one whose run, and model with it, was deleted is removed."""
    from mlflow.exceptions import MlflowException

    for version in client.search_model_versions(f"name = '{MODEL}' and tags.checkpoint_sha256 = '{checkpoint_sha256}'"):
        try:
            if client.get_run(version.run_id).info.lifecycle_stage == "active":
                return version
        except MlflowException as error:
            if error.error_code not in REFUSED:
                raise
        client.delete_model_version(MODEL, version.version)
    return None


def _new_version(client, owner: str, checkpoint: Path, sampling: dict, tags: dict[str, str]) -> str:
    """Its number. What is registered lies among the run's artifacts: this library, the weights, and how to sample."""
    import mlflow

    library = Path(__file__).parents[1]
    with tempfile.TemporaryDirectory() as folder:
        mlflow.pyfunc.save_model(
            Path(folder) / "generator",
            python_model=str(library / "tracking/served_model.py"),
            code_paths=[str(library)],
            artifacts={"checkpoint": str(checkpoint)},
            model_config=sampling,
            pip_requirements=[f"{name}=={metadata.version(name).partition('+')[0]}" for name in NEEDED],
        )
        client.log_artifacts(owner, str(Path(folder) / "generator"), "generator")
    source = f"{client.get_run(owner).info.artifact_uri}/generator"
    return client.create_model_version(MODEL, source, owner, tags=tags).version


def champion(root: Path) -> tuple[str, Path, SampleParams] | None:
    """What to call the champion, a copy of its checkpoint, and the sampling that it was judged by; None without a champion.

    Raises UserError where MLflow can't be reached, or doesn't hand the model out.
    """
    uri = tracking_uri(root)
    if not store_exists(uri):
        return None
    import mlflow

    quiet()
    remedy = "`python src/serve.py models/diffusion_model.pth` serves a file"
    try:
        found = mlflow.MlflowClient(uri, uri).get_model_version_by_alias(MODEL, CHAMPION)
    except Exception as error:
        if getattr(error, "error_code", None) in REFUSED:  # it was never registered
            return None
        raise UserError(f"MLflow at {without_password(uri)}: {root_cause(error)}; {remedy}") from None
    name, digest = f"{MODEL}, version {found.version}", found.tags.get("checkpoint_sha256")
    try:
        sampling = SampleParams.model_validate_json(found.tags["sampling"])
    except (KeyError, ValueError):
        raise UserError(f"{name}, the champion, was not registered by this version of the pipeline; {remedy}") from None
    path = root / ".cache" / "champion" / f"{digest}.pth"
    if not path.exists():
        file = f"{found.source}/artifacts/diffusion_model.pth"
        try:
            with tempfile.TemporaryDirectory() as folder:
                copy = mlflow.artifacts.download_artifacts(file, dst_path=folder, tracking_uri=uri)
                write_atomic(path, Path(copy).read_bytes())
        except Exception as error:
            raise UserError(f"MLflow at {without_password(uri)}: {file}: {root_cause(error)}; {remedy}") from None
    return name, path, sampling
