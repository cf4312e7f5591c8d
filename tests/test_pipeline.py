"""The real pipeline on the real data: `dvc repro` of the smoke preset in a fresh clone, and what a user does next."""

import json
import random
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image
from torchvision.datasets import FashionMNIST

import crash
from clones import edit_params
from ddpm.training.state import load_state
from helpers import copied, mlflow_runs, run, stages_run, start

pytestmark = pytest.mark.slow


@pytest.fixture
def clone(tmp_path: Path, smoke_run: Path) -> Path:
    return copied(smoke_run, tmp_path)


def test_outputs_are_as_promised(smoke_run: Path) -> None:
    clone = smoke_run
    params = yaml.safe_load((clone / "params.yaml").read_text())
    model = torch.load(clone / "models/diffusion_model.pth", weights_only=True)
    assert model["unet"]["channels"] == params["train"]["model"]["channels"]
    assert all(torch.isfinite(w).all() for part in ("weights", "guide") for w in model[part].values())
    assert any(not torch.equal(w, model["guide"][name]) for name, w in model["weights"].items())
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
        "class_accuracy", "class_accuracy_real", "nearest_neighbour_ratio", "c2st_auc", "c2st_accuracy", "c2st_auc_real",
    } <= evaluation.keys()  # fmt: skip
    assert evaluation["fid"] > 10 * evaluation["fid_floor"]  # sixty steps make noise, and the metrics say so
    assert evaluation["class_accuracy_real"] >= 0.93
    assert evaluation["c2st_auc"] > 0.95 > 0.65 > evaluation["c2st_auc_real"]

    for name in ("train", "validation"):
        lines = (clone / f"output/plots/{name}.tsv").read_text().splitlines()
        assert lines[0].startswith("step\tloss\t")
        assert lines[-1].startswith("60\t")


def test_mlflow_has_the_runs(smoke_run: Path) -> None:
    from mlflow import MlflowClient

    clone = smoke_run
    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    (train,), (sample,), (evaluate,) = (mlflow_runs(clone, stage) for stage in ("train", "sample", "evaluate"))
    assert {r.info.status for r in (train, sample, evaluate)} == {"FINISHED"}
    assert sample.data.tags["mlflow.parentRunId"] == evaluate.data.tags["mlflow.parentRunId"] == train.info.run_id
    for r in (train, sample, evaluate):
        assert r.data.params["train.model.channels"] == "[16, 32]"
        assert r.data.params["sample.steps"] == "5"
        assert r.data.tags["mlflow.source.git.commit"] == run(clone, "git", "rev-parse", "HEAD~1").strip()  # HEAD has its results

    losses = client.get_metric_history(train.info.run_id, "train/loss")
    assert sorted(m.step for m in losses) == list(range(1, 61))
    assert sorted(m.step for m in client.get_metric_history(train.info.run_id, "val/loss")) == [0, 30, 60]
    assert "system/cpu_utilization_percentage" in train.data.metrics
    assert train.inputs.dataset_inputs[0].dataset.name == "FashionMNIST"
    previews = [re.search(r"[+%]step[+%](\d+)", a.path) for a in client.list_artifacts(train.info.run_id, "images")]
    assert {int(found[1]) for found in previews} == {0, 30, 60}

    stored = Path(client.download_artifacts(train.info.run_id, "model/diffusion_model.pth"))
    assert stored.read_bytes() == (clone / "models/diffusion_model.pth").read_bytes()
    assert train.info.artifact_uri.startswith((clone / "mlartifacts").as_uri())
    metrics = json.loads((clone / "output/metrics/evaluate.json").read_text())
    assert evaluate.data.metrics["eval/fid"] == metrics["fid"]
    assert train.data.metrics["eval/fid"] == float(f"{metrics['fid']:.4g}")  # a copy
    assert train.data.tags["best_evaluation"] == evaluate.info.run_id
    assert {a.path for a in client.list_artifacts(sample.info.run_id)} == {
        "generated_samples.png", "denoising.png", "denoising.gif",
    }  # fmt: skip
    assert not [path for path in (clone / ".resume").iterdir() if path.is_dir()]  # nothing to go on from, nothing unshipped


def test_a_fresh_clone_plots_the_curves_of_its_commit(smoke_run: Path, tmp_path: Path) -> None:
    run(tmp_path, "git", "clone", "--quiet", str(smoke_run), "fresh")
    plots = json.loads(run(tmp_path / "fresh", "dvc", "plots", "diff", "HEAD", "--json"))["data"]
    for title in ("Loss", "Validation loss by quarter of the timesteps", "Learning rate", "Gradient norm"):
        (plot,) = plots[title]
        assert plot["revisions"] == ["workspace", "HEAD"]
        points = plot["content"]["data"]["values"]
        assert len({point["step"] for point in points if point["rev"] == "HEAD"}) > 1


def test_second_repro_does_nothing(clone: Path) -> None:
    assert "up to date" in run(clone, "dvc", "repro").splitlines()[-1]


def test_edits_rerun_what_they_change_and_nothing_else(clone: Path) -> None:
    edit_params(clone, {"runtime": {"compile": False}})
    with (clone / "src/ddpm/tracking/run.py").open("a") as f:
        f.write("# logging changes no result\n")
    assert stages_run(run(clone, "dvc", "repro")) == []

    edit_params(clone, {"sample": {"sampler": "dpmpp_2m", "seed": 2}})
    assert stages_run(run(clone, "dvc", "repro")) == ["sample", "evaluate"]
    train, *others = mlflow_runs(clone, "train")
    assert not others
    fids = [r.data.metrics["eval/fid"] for r in mlflow_runs(clone, "evaluate")]
    assert len(set(fids)) == 2
    assert train.data.metrics["eval/fid"] == float(f"{min(fids):.4g}")


@pytest.fixture(scope="module")
def forced(tmp_path_factory: pytest.TempPathFactory, smoke_run: Path) -> list[crash.Victim]:
    """All stages, after each was forced to run again, undisturbed."""
    return crash.victims(copied(smoke_run, tmp_path_factory.mktemp("forced")))


def test_forced_repro_gives_the_same_bytes(smoke_run: Path, forced: list[crash.Victim]) -> None:
    assert {victim.lock for victim in forced} == {(smoke_run / "dvc.lock").read_bytes()}


@pytest.mark.parametrize(
    ("stage", "number", "status", "last"),
    [
        ("train", signal.SIGTERM, 143, r"Stopped after step \d+\. Run the same command again to resume\."),
        ("sample", signal.SIGINT, 130, r"Stopped\. Run the same command again to resume\."),
    ],
)
def test_a_stopped_stage_says_how_to_go_on_and_does(clone: Path, stage: str, number: int, status: int, last: str) -> None:
    output = clone / {"train": "models/diffusion_model.pth", "sample": "output/samples.npz"}[stage]
    before, runs = output.read_bytes(), len(mlflow_runs(clone, stage))
    process = start(clone, "python", f"src/{stage}.py")
    started = "train/loss" if stage == "train" else '"start"'
    while not any(started in path.read_text() for path in (clone / ".resume").glob("*/journal.jsonl")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert re.fullmatch(last, errors.splitlines()[-1])
    assert "Traceback" not in errors
    assert mlflow_runs(clone, stage)[-1].info.status == "KILLED"

    run(clone, "python", f"src/{stage}.py")
    assert output.read_bytes() == before
    assert len(mlflow_runs(clone, stage)) == runs + 1
    assert mlflow_runs(clone, stage)[-1].info.status == "FINISHED"


def test_killed_at_random_moments_it_ends_in_the_same_bytes(forced: list[crash.Victim]) -> None:
    kills, faults, seed = 0, [], random.randrange(10**6)
    for n, (said, struck, wrong) in enumerate(crash.ordeals(forced, 12, random.Random(seed))):
        kills += struck
        faults += [f"{said}: {fault}" for fault in wrong]
        if kills >= 4 and n >= 3:  # every stage at least once
            break
    assert faults == [], f"seed {seed}"
    assert kills >= 4


def test_a_full_disk_says_so_and_the_last_good_state_serves(clone: Path) -> None:
    """On a small file system of its own."""
    before, resume = (clone / "models/diffusion_model.pth").read_bytes(), clone / ".resume"
    shutil.rmtree(resume)
    resume.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32m", "tmpfs", resume], capture_output=True, check=False).returncode:
        pytest.skip("no right to mount a small file system")
    try:
        process = start(clone, "python", "src/train.py")
        while not list(resume.glob("*/state-*.pt")):
            assert process.poll() is None
            time.sleep(0.01)
        with (resume / "filler").open("wb", buffering=0) as filler, pytest.raises(OSError, match="No space left"):
            while True:
                filler.write(bytes(4096))
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 1
        assert re.fullmatch(r"error: \S+: can't be written \(No space left on device\)", errors.splitlines()[-1])
        assert "Traceback" not in errors
        (folder,) = {path.parent for path in resume.glob("*/state-*.pt")}
        assert 0 < load_state(folder)["step"] < 60
        (resume / "filler").unlink()
        run(clone, "python", "src/train.py")
        assert (clone / "models/diffusion_model.pth").read_bytes() == before
    finally:
        subprocess.run(["umount", "--lazy", resume], check=True)
