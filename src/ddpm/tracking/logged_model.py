"""MLflow's logged models, which its tab Models lists: one for each training, with its parameters and its best evaluation."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel, Run

KIND = "diffusion"  # what the page shows as the model's type


def logged_models(client: "MlflowClient", training: "Run") -> list["LoggedModel"]:
    """The logged models of a training, the newest first: one, or more if their replacement was interrupted.

    Empty if the run has none, for example because the server is too old for them.
    """
    if not training.outputs or not training.outputs.model_outputs:
        return []
    return _find(client, training)


def complete_logged_model(
    client: "MlflowClient", training: "Run", name: str, params: dict[str, str], tags: dict[str, str]
) -> "LoggedModel":
    """The logged model of a training, which is created if there is none. The next call completes one that was interrupted.

    Raises MlflowException if the server is too old for logged models.
    """
    found = _find(client, training)
    name = name.replace(".", "-")  # MLflow doesn't allow dots in these names
    model = found[0] if found else _create(client, training, name, params, tags)
    return _make_ready(client, training, model)


def without_metrics(client: "MlflowClient", training: "Run", models: list["LoggedModel"]) -> "LoggedModel":
    """The newest of a training's models if it has no metrics yet, else a copy without them.

    MLflow can't remove metrics, and its pages show the oldest. So a model with a better evaluation takes the old one's place.
    """
    newest = models[0]
    if not newest.metrics:
        return newest
    return _make_ready(client, training, _create(client, training, newest.name, newest.params, newest.tags))


def _find(client: "MlflowClient", training: "Run") -> list["LoggedModel"]:
    return list(client.search_logged_models([training.info.experiment_id], f"source_run_id = '{training.info.run_id}'"))


def _create(client: "MlflowClient", training: "Run", name: str, params: dict[str, str], tags: dict[str, str]) -> "LoggedModel":
    return client.create_logged_model(training.info.experiment_id, name, training.info.run_id, tags, params, KIND)


def _make_ready(client: "MlflowClient", training: "Run", model: "LoggedModel") -> "LoggedModel":
    from mlflow.entities import LoggedModelOutput

    client.finalize_logged_model(model.model_id, "READY")
    outputs = training.outputs.model_outputs if training.outputs else []
    if model.model_id not in [output.model_id for output in outputs]:
        client.log_outputs(training.info.run_id, [LoggedModelOutput(model.model_id, 0)])
    return model
