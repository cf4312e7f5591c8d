"""The real pipeline on the real data: `dvc repro` of the smoke preset in a fresh clone, and what a user does next.

One clone serves all tests of this file, in order: each goes on from where the one before it left off.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import FashionMNIST

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.pipeline


def environment() -> dict[str, str]:
    """Ours, without what an outer DVC or MLflow would tell the pipeline, and with this Python first on the path.

    The machine's load is sampled every second: the smoke preset would be over before the ten that MLflow takes.
    """
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("DVC_", "MLFLOW_"))}
    path = f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"
    return {**clean, "PATH": path, "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "1"}


def run(clone: Path, *command: str) -> str:
    done = subprocess.run(command, cwd=clone, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def merge(base: dict, changes: dict) -> dict:
    return {**base, **{k: merge(base[k], v) if isinstance(v, dict) else v for k, v in changes.items()}}


def edit_params(clone: Path, changes: dict) -> None:
    path = clone / "params.yaml"
    path.write_text(yaml.safe_dump(merge(yaml.safe_load(path.read_text()), changes)))


def stages_run(output: str) -> list[str]:
    return [line.split("'")[1] for line in output.splitlines() if line.startswith("Running stage")]


def mlflow_runs(clone: Path, stage: str) -> list:
    """Runs of a stage, oldest first."""
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fashion-mnist-ddpm")
    return client.search_runs([experiment.experiment_id], f"tags.stage = '{stage}'", order_by=["attributes.start_time ASC"])


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, fashion_mnist: Path) -> Path:
    """A fresh clone of the committed tree with this tree's edits, after `dvc repro` of the smoke preset."""
    clone = tmp_path_factory.mktemp("pipeline") / "clone"
    subprocess.run(["git", "clone", "-q", REPOSITORY, clone], check=True)
    changed = run(REPOSITORY, "git", "ls-files", "--modified", "--others", "--exclude-standard").split()
    for name in changed:
        if (REPOSITORY / name).is_file():
            (clone / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(REPOSITORY / name, clone / name)
    edit_params(clone, yaml.safe_load((REPOSITORY / "presets/smoke.yaml").read_text()))
    edit_params(clone, {"runtime": {"data_folder": str(fashion_mnist)}})
    run(clone, "git", "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "-qam", "smoke preset")
    assert stages_run(run(clone, "dvc", "repro")) == ["download", "train", "sample", "evaluate"]
    return clone


def test_outputs_are_as_promised(clone: Path) -> None:
    params = yaml.safe_load((clone / "params.yaml").read_text())
    model = torch.load(clone / "models/diffusion_model.pth", weights_only=True)
    assert model["unet"]["channels"] == params["train"]["model"]["channels"]
    assert all(torch.isfinite(w).all() for w in model["weights"].values())
    assert len(FashionMNIST(clone / "data", download=False)) == 60_000

    samples = np.load(clone / "output/samples.npz")
    assert samples["images"].shape == (200, 28, 28)
    assert samples["images"].dtype == np.uint8
    assert samples["labels"].dtype == np.int64
    assert np.bincount(samples["labels"]).tolist() == [20] * 10
    for name in ("generated_samples.png", "denoising.png", "nearest_neighbours.png"):
        with Image.open(clone / "output" / name) as image:
            assert min(image.size) > 100
    with Image.open(clone / "output/denoising.gif") as animation:
        assert animation.n_frames == params["sample"]["steps"] + 1

    train = json.loads((clone / "output/metrics/train.json").read_text())
    assert 0 < train["val_loss"] < 2
    evaluation = json.loads((clone / "output/metrics/evaluate.json").read_text())
    assert {
        "fid", "fid_test", "fid_floor", "kid", "kid_floor", "precision", "recall", "density", "coverage",
        "class_accuracy", "class_accuracy_real", "nearest_neighbour_ratio",
    } <= evaluation.keys()  # fmt: skip
    assert evaluation["fid"] > 10 * evaluation["fid_floor"]  # sixty steps make noise, and the metrics say so
    assert evaluation["class_accuracy_real"] >= 0.93

    for name in ("train", "validation"):
        lines = (clone / f"output/plots/{name}.tsv").read_text().splitlines()
        assert lines[0].startswith("step\tloss\t")
        assert lines[-1].startswith("60\t")


def test_mlflow_has_the_runs(clone: Path) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    (train,), (sample,), (evaluate,) = (mlflow_runs(clone, stage) for stage in ("train", "sample", "evaluate"))
    assert {r.info.status for r in (train, sample, evaluate)} == {"FINISHED"}
    assert sample.data.tags["mlflow.parentRunId"] == evaluate.data.tags["mlflow.parentRunId"] == train.info.run_id
    for r in (train, sample, evaluate):
        assert r.data.params["train.model.channels"] == "[16, 32]"
        assert r.data.params["sample.steps"] == "5"
        assert r.data.tags["mlflow.source.git.commit"] == run(clone, "git", "rev-parse", "HEAD").strip()

    losses = client.get_metric_history(train.info.run_id, "train/loss")
    assert sorted(m.step for m in losses) == list(range(1, 61))
    assert sorted(m.step for m in client.get_metric_history(train.info.run_id, "val/loss")) == [0, 30, 60]
    assert "system/cpu_utilization_percentage" in train.data.metrics
    assert train.inputs.dataset_inputs[0].dataset.name == "fashion-mnist"
    previews = [re.search(r"[+%]step[+%](\d+)", a.path) for a in client.list_artifacts(train.info.run_id, "images")]
    assert {int(found[1]) for found in previews} == {0, 30, 60}

    stored = Path(client.download_artifacts(train.info.run_id, "model/diffusion_model.pth"))
    assert stored.read_bytes() == (clone / "models/diffusion_model.pth").read_bytes()
    assert train.info.artifact_uri.startswith((clone / "mlartifacts").as_uri())
    metrics = json.loads((clone / "output/metrics/evaluate.json").read_text())
    assert train.data.metrics["eval/fid"] == evaluate.data.metrics["eval/fid"] == metrics["fid"]
    assert train.data.tags["best_evaluation"] == evaluate.info.run_id
    assert {a.path for a in client.list_artifacts(sample.info.run_id)} == {
        "generated_samples.png", "denoising.png", "denoising.gif",
    }  # fmt: skip
    assert not list((clone / ".resume").rglob("*.jsonl"))


def test_second_repro_does_nothing(clone: Path) -> None:
    assert "up to date" in run(clone, "dvc", "repro").splitlines()[-1]


def test_edits_rerun_what_they_change_and_nothing_else(clone: Path) -> None:
    edit_params(clone, {"runtime": {"compile": False}})
    with (clone / "src/ddpm/tracking.py").open("a") as f:
        f.write("# logging changes no result\n")
    assert stages_run(run(clone, "dvc", "repro")) == []

    edit_params(clone, {"sample": {"sampler": "dpmpp_2m", "seed": 2}})
    assert stages_run(run(clone, "dvc", "repro")) == ["sample", "evaluate"]
    train, *others = mlflow_runs(clone, "train")
    assert not others
    fids = [r.data.metrics["eval/fid"] for r in mlflow_runs(clone, "evaluate")]
    assert len(set(fids)) == 2
    assert train.data.metrics["eval/fid"] == min(fids)


def test_forced_repro_gives_the_same_bytes(clone: Path) -> None:
    before = (clone / "dvc.lock").read_text()
    assert len(stages_run(run(clone, "dvc", "repro", "-f"))) == 4
    assert (clone / "dvc.lock").read_text() == before


def test_temporary_experiment_lands_in_the_main_store(clone: Path) -> None:
    run(clone, "dvc", "exp", "run", "--temp", "-n", "swift-otter", "-S", "train.seed=7")
    newest = mlflow_runs(clone, "evaluate")[-1]
    assert newest.data.tags["dvc_exp_name"] == "swift-otter"
    assert newest.data.params["train.seed"] == "7"
    assert newest.info.artifact_uri.startswith((clone / "mlartifacts").as_uri())
    parent = mlflow_runs(clone, "train")[-1]
    assert newest.data.tags["mlflow.parentRunId"] == parent.info.run_id
    table = json.loads(run(clone, "dvc", "exp", "show", "--json"))
    shown = [e["name"] for revision in table for e in revision["experiments"] or []]
    assert "swift-otter" in shown
