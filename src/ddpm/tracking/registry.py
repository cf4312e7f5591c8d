"""MLflow's registry: a version for each checkpoint, and the alias `champion` for the best of them."""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path

from ddpm.params import SampleParams, UserError
from ddpm.tracking.store import REFUSED, quiet, root_cause, store_exists, tracking_uri

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
    tags = {name: evaluation.data.tags[name] for name in ("checkpoint_sha256", "evaluator_sha256", "samples")}
    tags |= {"fid": str(evaluation.data.metrics["eval/fid"]), "sampling": json.dumps(sampling)}
    tags |= {"evaluation": evaluation.info.run_id}
    found = client.search_model_versions(f"name = '{MODEL}' and tags.checkpoint_sha256 = '{tags['checkpoint_sha256']}'")
    number = found[0].version if found else _new_version(client, owner, checkpoint, sampling, tags)
    if not found or _better(tags, found[0].tags):
        for name, value in tags.items():
            client.set_model_version_tag(MODEL, number, name, value)
        described = f"FID {float(tags['fid']):.4g} of {tags['samples']} samples; {evaluation.info.run_name}"
        client.update_model_version(MODEL, number, described)
    best = client.get_registered_model(MODEL).aliases.get(CHAMPION)
    if best is None or (str(best) != str(number) and _better(tags, client.get_model_version(MODEL, best).tags)):
        client.set_registered_model_alias(MODEL, CHAMPION, number)


def _better(mine: dict[str, str], theirs: dict[str, str]) -> bool:
    comparable = mine["evaluator_sha256"] == theirs["evaluator_sha256"] and int(mine["samples"]) >= int(theirs["samples"])
    return comparable and float(mine["fid"]) < float(theirs["fid"])


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
            pip_requirements=[f"{name}=={version(name).partition('+')[0]}" for name in NEEDED],
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
    from mlflow.exceptions import MlflowException

    quiet()
    try:
        found = mlflow.MlflowClient(uri).get_model_version_by_alias(MODEL, CHAMPION)
    except MlflowException as error:
        if error.error_code in REFUSED:  # it was never registered
            return None
        raise UserError(f"MLflow at {uri}: {root_cause(error)}") from None
    (copies := root / ".cache" / "champion").mkdir(parents=True, exist_ok=True)
    file = f"{found.source}/artifacts/diffusion_model.pth"
    try:
        path = Path(mlflow.artifacts.download_artifacts(file, dst_path=str(copies), tracking_uri=uri))
    except Exception as error:
        raise UserError(f"MLflow at {uri}: {file}: {root_cause(error)}") from None
    return f"{MODEL}, version {found.version}", path, SampleParams.model_validate_json(found.tags["sampling"])
