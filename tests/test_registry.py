"""The registry of a real MLflow store: one version a checkpoint, and who is champion."""

import json
import threading
from pathlib import Path

import pytest

from ddpm.errors import UserError
from ddpm.params import SampleParams
from ddpm.tracking import run as runs
from ddpm.tracking.connection import EXPERIMENT, MODEL_NAME, experiment_name, model_name, tracking_uri
from ddpm.tracking.registry import CHAMPION, champion
from ddpm.tracking.run import start_run

pytestmark = pytest.mark.slow

SAMPLING = {
    "sampler": "dpmpp_2m", "steps": 7, "spacing": "tapered", "eta": 0.0, "variance": "small", "clip": True,
    "guidance_scale": 1.5, "guidance_interval": [0.2, 3.2], "classes": "all", "count": 1000, "seed": 3,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME", "DVC_EXP_NAME", "DVC_EXP_BASELINE_REV"):
            patch.delenv(name, raising=False)
        patch.setattr(runs, "SHIP_SECONDS", 0.05)
        yield


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("store")


@pytest.fixture(scope="module")
def client(root):
    import mlflow

    return mlflow.MlflowClient(tracking_uri(root))


@pytest.fixture(autouse=True)
def empty(request):
    """No model in the registry, once there is a store."""
    if "client" in request.fixturenames and (request.getfixturevalue("root") / "mlflow.db").exists():
        client = request.getfixturevalue("client")
        for model in client.search_registered_models():
            client.delete_registered_model(model.name)


def evaluate(
    root: Path, name: str, fid: float, samples: int = 1000, evaluator: str = "e", data: str = "FashionMNIST", **sampling
) -> None:
    """As the stage does, of a checkpoint that is known by its name."""
    params = {"data": {"name": data}}
    with start_run("evaluate", params, root, root / ".resume" / f"{name}-{fid}", checkpoint_sha256=name) as run:
        run.tags({"samples": samples, "evaluator_sha256": evaluator, "data_sha256": f"sha of {data}"})
        run.dataset(data, "0123", "data/raw", {}, "evaluation")
        values = {"eval/fid": fid, "eval/fid_floor": 0.0123456}
        run.metrics(0, values)
        run.best_evaluation(values)
        run.register(name.encode(), {**SAMPLING, **sampling})


def versions(client, model: str = MODEL_NAME) -> dict[str, str]:
    """Checkpoint and FID of each."""
    return {v.tags["checkpoint_sha256"]: v.tags["fid"] for v in client.search_model_versions(f"name = '{model}'")}


def best(client, model: str = MODEL_NAME) -> str:
    return client.get_model_version_by_alias(model, CHAMPION).tags["checkpoint_sha256"]


def test_looking_for_a_champion_creates_no_store(tmp_path, root, client):
    assert champion(tmp_path) is None
    assert list(tmp_path.iterdir()) == []
    with start_run("train", {}, root, root / ".resume" / "train"):
        pass
    assert champion(root) is None


def test_a_checkpoint_is_one_version_with_its_best_evaluation(root, client):
    evaluate(root, "one", 0.5)
    evaluate(root, "one", 0.7)
    assert versions(client) == {"one": "0.5"}
    evaluate(root, "one", 0.4, steps=9)
    assert versions(client) == {"one": "0.4"}
    (version,) = client.search_model_versions(f"name = '{MODEL_NAME}'")
    assert client.get_run(version.tags["evaluation"]).data.metrics["eval/fid"] == 0.4
    assert version.description.startswith("FID 0.4 of 1000 samples (dpmpp_2m, 9 steps, guidance 1.5)\n")
    assert "| FID, less is better | 0.4 | 0.01235 |" in version.description
    assert version.tags["evaluation"] in version.description
    name, path, sampling = champion(root)
    assert name == f"{MODEL_NAME}, version 1"
    assert path.read_text() == "one"
    assert sampling == SampleParams.model_validate({**SAMPLING, "steps": 9})


def test_a_champion_from_before_guidance_had_an_interval_is_guided_everywhere(root, client):
    evaluate(root, "old", 0.5)
    (version,) = client.search_model_versions(f"name = '{MODEL_NAME}'")
    of_old = {key: value for key, value in SAMPLING.items() if key != "guidance_interval"}
    client.set_model_version_tag(MODEL_NAME, version.version, "sampling", json.dumps(of_old))
    _, _, sampling = champion(root)
    assert sampling == SampleParams.model_validate({**SAMPLING, "guidance_interval": None})


def test_a_journal_from_before_guidance_had_an_interval_makes_a_version_that_can_be_served(root, client, monkeypatch):
    monkeypatch.delitem(SAMPLING, "guidance_interval")
    evaluate(root, "old", 0.5)
    _, _, sampling = champion(root)
    assert sampling == SampleParams.model_validate({**SAMPLING, "guidance_interval": None})
    (version,) = client.search_model_versions(f"name = '{MODEL_NAME}'")
    assert "guidance_interval: null" in Path(client.download_artifacts(version.run_id, "generator/MLmodel")).read_text()


@pytest.mark.parametrize(
    ("challenger", "wins"),
    [
        ({"fid": 0.4}, True),
        ({"fid": 0.5}, False),
        ({"fid": 0.6}, False),
        ({"fid": 0.4, "samples": 999}, False),  # fewer raise it, and are weaker evidence
        ({"fid": 0.4, "samples": 2000}, True),
        ({"fid": 0.6, "samples": 2000}, False),
        ({"fid": 0.4, "evaluator": "another"}, False),
    ],
)
def test_the_champion_changes_only_for_a_better_one(root, client, challenger, wins):
    evaluate(root, "old", 0.5)
    evaluate(root, "new", **challenger)
    assert best(client) == ("new" if wins else "old")
    assert len(versions(client)) == 2


def test_the_version_belongs_to_the_training_that_made_the_checkpoint(root, client):
    with start_run("train", {}, root, root / ".resume" / "parent") as run:
        run.tags({"checkpoint_sha256": "child"})
    evaluate(root, "child", 0.5)
    (version,) = client.search_model_versions(f"name = '{MODEL_NAME}'")
    owner = client.get_run(version.run_id)
    assert owner.data.tags["stage"] == "train"
    assert owner.info.status == "FINISHED"
    assert {"generator"} == {file.path for file in client.list_artifacts(version.run_id)}
    assert version.source == f"{owner.info.artifact_uri}/generator"


def test_models_of_other_images_have_a_champion_and_an_experiment_of_their_own(root, client):
    evaluate(root, "garments", 0.5)
    evaluate(root, "small sprites", 0.1, data="sprites")
    evaluate(root, "sprites", 0.05, data="sprites")
    assert (versions(client), best(client)) == ({"garments": "0.5"}, "garments")
    assert versions(client, "sprites-ddpm") == {"small sprites": "0.1", "sprites": "0.05"}
    assert best(client, "sprites-ddpm") == "sprites"
    assert champion(root)[1].read_text() == "garments"
    assert champion(root, "sprites")[1].read_text() == "sprites"
    assert champion(root, "photos") is None
    evaluate(root, "other sprites", 0.3, data="sprites.v2")  # MLflow's logged models have no dots in their names
    assert best(client, "sprites.v2-ddpm") == "other sprites"
    of_sprites = client.get_experiment_by_name("sprites-ddpm").experiment_id
    assert {run.data.params["data.name"] for run in client.search_runs([of_sprites])} == {"sprites"}


@pytest.mark.parametrize("data_set", ["fashion", "fashion-mnist"])
def test_no_other_images_take_the_names_of_fashion_mnist(data_set):
    assert not {experiment_name(data_set), model_name(data_set)} & {EXPERIMENT, MODEL_NAME}


@pytest.mark.parametrize(
    "fails", [None, "create_logged_model", "finalize_logged_model", "log_outputs", "log_batch", "delete_logged_model"]
)
@pytest.mark.parametrize("data", ["FashionMNIST", "sprites.v2"])
def test_a_trained_model_is_in_the_tab_models(root, client, monkeypatch, data, fails):
    """With what it was trained with, its best evaluation alone, and its version, also where the connection fails in between."""
    import mlflow

    name, remaining = f"model {fails} {data}", [fails]
    if fails:
        real = getattr(mlflow.MlflowClient, fails)

        def fails_once(self, *arguments, **options):
            done = real(self, *arguments, **options)
            if remaining.pop():
                raise mlflow.exceptions.MlflowException("gone")
            return done

        monkeypatch.setattr(mlflow.MlflowClient, fails, lambda *a, **o: (fails_once if remaining else real)(*a, **o))
    monkeypatch.setattr(runs, "RETRY_SECONDS", 0.05)
    with start_run("train", {"train": {"seed": 3}, "data": {"name": data}}, root, root / ".resume" / name) as run:
        run.tags({"checkpoint_sha256": name})
        run.model({"train": {"seed": 3}}, {"checkpoint_sha256": name, "parameters": 7})
    for fid in (0.5, 0.123456, 0.2):
        evaluate(root, name, fid, data=data)
    assert bool(remaining) == (fails is None)
    (training,) = client.search_runs([run.store.run.experiment_id], f"tags.checkpoint_sha256 = '{name}' and tags.stage = 'train'")
    (model,) = client.search_logged_models([training.info.experiment_id], f"source_run_id = '{training.info.run_id}'")
    assert model.model_id in [output.model_id for output in training.outputs.model_outputs]
    assert (model.name, str(model.status)) == (model_name(data).replace(".", "-"), "READY")
    assert model.params == {"train.seed": "3"} and model.tags["checkpoint_sha256"] == name and model.tags["parameters"] == "7"
    assert {(m.key, m.value, m.dataset_name, m.dataset_digest) for m in model.metrics} == {
        ("eval/fid", 0.1235, data, "0123"),
        ("eval/fid_floor", 0.01235, data, "0123"),
    }
    (version,) = client.search_model_versions(f"name = '{model_name(data)}'")
    assert version.run_id == training.info.run_id
    assert json.loads(model.tags["mlflow.modelVersions"]) == [{"name": model_name(data), "version": version.version}]
    assert client.get_run(version.tags["evaluation"]).data.metrics["eval/fid"] == 0.123456  # exact where it was measured


CALLS = (  # of the client, in which a registration can be interrupted, and after how many good ones
    ("create_registered_model", 0), ("search_model_versions", 0), ("log_artifacts", 0), ("create_model_version", 0),
    *(("set_model_version_tag", good) for good in range(7)), ("update_model_version", 0), ("set_registered_model_alias", 0),
)  # fmt: skip


FOR_NEW_ONES = ("log_artifacts", "create_model_version", "set_registered_model_alias")


@pytest.mark.parametrize(
    ("call", "good", "known"), [(*c, known) for c in CALLS for known in (False, True) if not (known and c[0] in FOR_NEW_ONES)]
)
def test_interrupted_half_way_it_is_completed(root, client, monkeypatch, call, good, known):
    import mlflow

    if known:
        evaluate(root, "torn", 0.9, steps=3)
    real, remaining = getattr(mlflow.MlflowClient, call), [good, 1]

    def fails_once(self, *arguments, **options):
        if remaining[0] == 0 and remaining[1]:
            remaining[1] = 0
            raise mlflow.exceptions.MlflowException("gone")
        remaining[0] -= 1
        return real(self, *arguments, **options)

    monkeypatch.setattr(mlflow.MlflowClient, call, fails_once)
    monkeypatch.setattr(runs, "RETRY_SECONDS", 0.05)
    evaluate(root, "torn", 0.5, steps=9)
    monkeypatch.undo()
    assert not remaining[1], "never called"
    assert versions(client) == {"torn": "0.5"}
    (version,) = client.search_model_versions(f"name = '{MODEL_NAME}'")
    assert best(client) == "torn"
    assert client.get_run(version.tags["evaluation"]).data.metrics["eval/fid"] == 0.5
    assert version.description.startswith("FID 0.5 of 1000 samples (dpmpp_2m, 9 steps, ")
    assert champion(root)[2].steps == 9


def test_a_champion_of_somebody_elses_holds_nobody_up(root, client):
    client.create_registered_model(MODEL_NAME)
    client.create_model_version(MODEL_NAME, (root / "elsewhere").as_uri())
    client.set_registered_model_alias(MODEL_NAME, CHAMPION, 1)
    with pytest.raises(
        UserError, match=r"version 1\) was not registered by this version of the pipeline; to serve a file instead: `python"
    ):
        champion(root)
    evaluate(root, "ours", 0.5)
    assert client.get_model_version_by_alias(MODEL_NAME, CHAMPION).version == 1
    assert client.get_model_version(MODEL_NAME, 2).tags["checkpoint_sha256"] == "ours"


def test_a_version_whose_run_was_deleted_is_made_anew(root, client):
    evaluate(root, "lost", 0.5)
    (version,) = client.search_model_versions(f"name = '{MODEL_NAME}'")
    client.delete_run(version.run_id)
    evaluate(root, "lost", 0.6)
    assert versions(client) == {"lost": "0.6"}
    assert best(client) == "lost"
    assert champion(root)[1].read_text() == "lost"


def test_a_damaged_store_is_told_in_one_line(tmp_path, monkeypatch):
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)  # MLflow sets it, where a store was opened
    (tmp_path / "mlflow.db").write_bytes(b"no database" * 1000)
    with pytest.raises(
        UserError, match=r"^MLflow at sqlite:.*; to serve a file instead: `python src/serve.py models/diffusion_model.pth`$"
    ):
        champion(tmp_path)


def test_two_evaluations_of_a_checkpoint_at_once_make_one_version(root, client):
    threads = [threading.Thread(target=evaluate, args=(root, "twin", fid)) for fid in (0.3, 0.2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert versions(client) == {"twin": "0.2"}
