"""What a user sees of experiments: the comparison, MLflow's UI in a real browser, the report, the served champion."""

import base64
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import dvc.api
import numpy as np
import pytest
import requests
from PIL import Image

import browser
from clones import AS_SOMEBODY
from ddpm.data.fashion_mnist import CLASSES
from ddpm.experiments import _experiment
from ddpm.files import file_sha256
from helpers import ENVIRONMENT, copied, free_port, mlflow_runs, run

pytestmark = pytest.mark.slow
needs_chromium = pytest.mark.skipif(not browser.CHROMIUM.exists(), reason="needs Debian's package chromium")


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory, smoke_run: Path) -> Path:
    """The smoke preset, and two experiments that began with it."""
    clone = copied(smoke_run, tmp_path_factory.mktemp("views"))
    run(clone, "dvc", "exp", "run", "--temp", "-n", "few-steps", "-S", "sample.steps=3")
    run(clone, "dvc", "exp", "run", "--temp", "-n", "sigmoid", "-S", "train.diffusion.schedule=sigmoid", "-S", "train.steps=90")
    return clone


@pytest.fixture(scope="module")
def shown(clone: Path) -> dict[str, dict]:
    """What `dvc exp show` knows of each experiment."""
    table = json.loads(run(clone, "dvc", "exp", "show", "--json"))
    rows = [table[1], *(e["revs"][0] for e in table[1]["experiments"])]
    return {row["name"]: row["data"] for row in rows}


def fid(data: dict) -> float:
    return data["metrics"]["output/metrics/evaluate.json"]["data"]["fid"]


def named(clone: Path, stage: str, name: str):
    (found,) = [r for r in mlflow_runs(clone, stage) if r.info.run_name.startswith(f"{stage} {name}")]
    return found


def test_temporary_experiments_land_in_the_main_store(clone: Path, shown: dict) -> None:
    assert {"few-steps", "sigmoid"} <= shown.keys()
    evaluation, training = named(clone, "evaluate", "sigmoid"), named(clone, "train", "sigmoid")
    assert evaluation.data.tags["dvc_exp_name"] == "sigmoid"
    assert evaluation.data.params["train.steps"] == "90"
    assert evaluation.data.tags["mlflow.parentRunId"] == training.info.run_id
    assert evaluation.info.artifact_uri.startswith((clone / "mlartifacts").as_uri())


def test_the_comparison_has_them_all_the_best_first(clone: Path, shown: dict) -> None:
    lines = run(clone, sys.executable, "src/compare.py").splitlines()  # a real start
    assert max(map(len, lines)) <= 100
    rows = [line.split() for line in lines if re.search(r"\d\.\d{4}", line)]
    by_fid = sorted(shown, key=lambda name: fid(shown[name]))
    assert rows[0][0] == "★"
    rows[0].pop(0)
    assert [row[0] for row in rows] == by_fid
    for name, row in zip(by_fid, rows, strict=True):
        metrics = shown[name]["metrics"]["output/metrics/evaluate.json"]["data"]
        assert f"{metrics['fid']:.3f}" in row
        assert f"{metrics['fid'] / metrics['fid_floor']:.0f}" in row
        assert f"{metrics['recall']:.3f}" in row
    text = "\n".join(lines)
    assert "sample.steps=3" in text
    assert "schedule=sigmoid" in text
    assert "evaluate few-steps" in text


def test_what_judged_an_experiment_is_known_from_dvc(shown: dict, clone: Path) -> None:
    metrics = json.loads((clone / "output/metrics/evaluate.json").read_text())
    judges = (metrics["data"], metrics["evaluator"])
    assert metrics["evaluator"] == file_sha256(clone / "models/classifier.pth")[:12]
    for name, data in shown.items():
        experiment = _experiment({"name": name, "rev": name, "data": data}, {})
        assert experiment.judged_by == judges
        assert not {"data", "evaluator"} & experiment.metrics.keys()


def test_experiments_of_an_amended_commit_are_still_compared(clone: Path, tmp_path: Path) -> None:
    """Also one that is queued. No branch leads to the commit that they started from any more."""
    clone = copied(clone, tmp_path)
    run(clone, "dvc", "exp", "run", "--queue", "-n", "waiting", "-S", "sample.steps=4")
    run(clone, "git", *AS_SOMEBODY, "commit", "--amend", "-qm", "amended")
    first_words = [line.replace("★", "").split()[:1] for line in run(clone, "python", "src/compare.py").splitlines()]
    for name in ("few-steps", "sigmoid", "waiting"):
        assert first_words.count([name]) == 1


def test_from_an_experiment_to_its_mlflow_run_and_back(clone: Path) -> None:
    judged = named(clone, "evaluate", "few-steps")
    there = run(clone, "python", "src/compare.py", "few-steps")
    assert judged.info.run_id in there
    for name in (judged.info.run_id, "evaluate few-steps"):
        back = run(clone, "python", "src/compare.py", name)
        assert back == there
        assert "`dvc exp apply few-steps`" in back
    failed = subprocess.run(["python", "src/compare.py", "nobody"], cwd=clone, env=ENVIRONMENT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "error: no finished experiment or evaluation is called nobody; `make compare` lists them\n"


def test_a_run_says_what_it_is_and_how_to_make_it_again(clone: Path) -> None:
    tags = named(clone, "evaluate", "few-steps").data.tags
    assert tags["changed"] == "sample.steps=3"
    assert named(clone, "evaluate", "smoke").data.tags["preset"] == "smoke"
    assert "dvc exp apply few-steps" in tags["mlflow.note.content"]
    head = run(clone, "git", "rev-parse", "--short=7", "HEAD").strip()
    assert f"git checkout {head} && dvc exp run -S sample.steps=3 " in tags["mlflow.note.content"]
    assert named(clone, "train", "sigmoid").data.tags["changed"] == "train.steps=90, train.diffusion.schedule=sigmoid"


def test_each_checkpoint_is_a_version_and_the_best_is_champion(clone: Path, shown: dict) -> None:
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{clone / 'mlflow.db'}")
    versions = client.search_model_versions("name = 'fashion-ddpm'")
    trainings = mlflow_runs(clone, "train")
    assert {v.run_id for v in versions} == {r.info.run_id for r in trainings}
    assert len(versions) == len(trainings) == 2
    champion = client.get_model_version_by_alias("fashion-ddpm", "champion")
    assert champion.tags["fid"] == f"{min(fid(data) for data in shown.values()):.4g}"


@pytest.fixture(scope="module")
def best_samples(clone: Path, shown: dict) -> np.ndarray:
    """The first ten samples of the experiment with the lowest FID, a class each."""
    name = min(shown, key=lambda name: fid(shown[name]))
    with np.load(io.BytesIO(dvc.api.read("output/samples.npz", repo=str(clone), rev=name, mode="rb"))) as samples:
        return samples["images"][:10].astype(int)


def server(clone: Path, command: list[str], ping: str, **environment: str) -> subprocess.Popen:
    """The process, once it answers; in a session of its own, for some leave children behind."""
    process = subprocess.Popen(
        command, cwd=clone, env=ENVIRONMENT | environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        try:
            if requests.get(ping, timeout=5).ok:
                return process
        except requests.ConnectionError:
            time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    raise AssertionError(process.communicate()[0])


def end(process: subprocess.Popen) -> None:
    os.killpg(process.pid, signal.SIGTERM)
    process.communicate(timeout=60)


def decoded(images: list[dict]) -> np.ndarray:
    assert [i["class"] for i in images] == list(CLASSES)
    return np.stack([np.asarray(Image.open(io.BytesIO(base64.b64decode(i["png"])))).astype(int) for i in images])


def test_serve_takes_the_champion(clone: Path, best_samples: np.ndarray) -> None:
    address = f"http://127.0.0.1:{(port := free_port())}"
    process = server(clone, [sys.executable, "src/serve.py", "--port", str(port)], f"{address}/about")
    try:
        assert requests.get(f"{address}/about", timeout=10).json()["model"].startswith("fashion-ddpm, version ")
        images = requests.post(f"{address}/images", json={}, timeout=60).json()["images"]
    finally:
        end(process)
    assert abs(decoded(images) - best_samples).max() <= 1


def test_mlflow_serves_the_champion_too(clone: Path, best_samples: np.ndarray, tmp_path: Path) -> None:
    """From another folder: the registered model has all of our code that it needs."""
    address = f"http://127.0.0.1:{(port := free_port())}"
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", "models:/fashion-ddpm@champion", "--env-manager", "local"]
    store = {"MLFLOW_TRACKING_URI": f"sqlite:///{clone / 'mlflow.db'}"}
    process = server(tmp_path, [*command, "--port", str(port)], f"{address}/ping", **store)
    try:
        (images,) = requests.post(f"{address}/invocations", json={"inputs": [{}]}, timeout=60).json()["predictions"]
        bad = requests.post(f"{address}/invocations", json={"inputs": [{"classes": ["Bagg"]}]}, timeout=60)
    finally:
        end(process)
    assert abs(decoded(images) - best_samples).max() <= 1
    assert bad.status_code == 400
    assert "did you mean Bag?" in bad.text


@pytest.fixture(scope="module")
def ui(clone: Path) -> Iterator[str]:
    """The address that `make ui` prints."""
    command = [sys.executable, "src/ui.py", "--port", str(free_port())]
    process = subprocess.Popen(command, cwd=clone, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    yield process.stdout.readline().strip()
    process.terminate()
    _, errors = process.communicate(timeout=60)
    assert "Traceback" not in errors


@needs_chromium
def test_the_ui_shows_runs_children_charts_and_grids(clone: Path, ui: str) -> None:
    train, sample = named(clone, "train", "sigmoid"), named(clone, "sample", "sigmoid")
    ui = ui.partition("&viewStateShareKey")[0]
    with browser.chromium() as chromium:
        page = browser.ui(chromium)
        page.goto(ui)
        browser.run_link(page, train.info.run_name).wait_for()
        assert browser.run_link(page, sample.info.run_name).count() == 0
        browser.expand(page, train.info.run_name)
        browser.run_link(page, sample.info.run_name).wait_for()
        browser.run_link(page, named(clone, "evaluate", "sigmoid").info.run_name).wait_for()

        card = browser.charts(page, ui, "train/loss")
        card.locator("path.js-line").first.wait_for()
        assert card.locator("path.js-line").count() >= 2  # a line a training, at least

        run_page = ui.partition("#")[0] + f"#/experiments/{train.info.experiment_id}/runs/"
        picture = browser.artifact(page, f"{run_page}{sample.info.run_id}?workflowType=machine_learning", "generated_samples.png")
        picture.wait_for()
        with Image.open(
            io.BytesIO(dvc.api.read("output/generated_samples.png", repo=str(clone), rev="sigmoid", mode="rb"))
        ) as grid:
            assert picture.evaluate("image => [image.naturalWidth, image.naturalHeight]") == list(grid.size)

        page.goto(f"{run_page}{train.info.run_id}?workflowType=machine_learning")
        page.get_by_text("dvc exp apply sigmoid").wait_for()


def test_links_name_the_port_that_the_ui_uses(clone: Path, ui: str) -> None:
    found = run(clone, "python", "src/compare.py", "few-steps")
    assert f"{ui.partition('#')[0]}#/experiments/" in found


@needs_chromium
def test_the_page_of_models_leads_from_each_to_its_run_and_version(clone: Path, ui: str) -> None:
    trainings = mlflow_runs(clone, "train")
    with browser.chromium() as chromium:
        page = browser.ui(chromium)
        page.set_viewport_size({"width": 2400, "height": 1000})
        page.goto(re.sub(r"/runs\?.*", "/models?workflowType=machine_learning", ui))
        page.get_by_text(re.compile(r"FashionMNIST \(#")).first.wait_for()
        for training in trainings:
            browser.run_link(page, training.info.run_name).wait_for()
            page.get_by_text(str(training.data.metrics["eval/fid"]), exact=True).first.wait_for()
        page.locator("a[href*='/models/fashion-ddpm/versions/']").first.click()
        page.get_by_text(re.compile(r"^FID [\d.]+ of 200 samples")).wait_for()


@needs_chromium
def test_the_saved_views_show_the_figures(clone: Path, ui: str) -> None:
    """`make ui` prints the address of the first, the trainings with the lowest FID first."""
    trainings = sorted(mlflow_runs(clone, "train"), key=lambda run: run.data.metrics["eval/fid"])
    judged = sorted(mlflow_runs(clone, "evaluate"), key=lambda run: run.data.metrics["eval/fid"])
    figures = ("eval/fid", "eval/fid_over_floor", "eval/c2st_auc", "eval/precision", "eval/recall", "eval/class_accuracy")
    with browser.chromium() as chromium:
        page = browser.ui(chromium)
        page.set_viewport_size({"width": 2400, "height": 2000})  # so that all columns and charts are in sight
        for view, rows, columns in (
            ("leaderboard", trainings, [*figures, "val/loss", "changed"]),
            ("evaluations", judged, [*figures, "sample.sampler", "sample.steps", "sample.guidance_scale"]),
        ):
            page.goto("about:blank")
            page.goto(ui.replace("leaderboard", view))
            for run in rows:
                browser.run_link(page, run.info.run_name).wait_for()
            heights = [browser.run_link(page, run.info.run_name).bounding_box()["y"] for run in rows]
            assert heights == sorted(heights)
            assert browser.run_link(page, named(clone, "sample", "sigmoid").info.run_name).count() == 0
            for column in columns:
                page.get_by_role("columnheader", name=column, exact=True).first.wait_for()
            best = rows[0].data.metrics
            assert best["eval/fid_over_floor"] == pytest.approx(best["eval/fid"] / best["eval/fid_floor"], rel=1e-3)
            page.get_by_text(str(best["eval/fid_over_floor"])[:7]).first.wait_for()
        page.goto("about:blank")
        page.goto(f"{ui.replace('leaderboard', 'curves')}&compareRunsMode=CHART")
        for title in ("train/loss", "train/images_per_second", "val/loss", "val/loss_quarter1"):
            page.get_by_test_id("experiment-view-compare-runs-card").filter(has_text=title).first.wait_for()


@pytest.fixture(scope="module")
def report(clone: Path, ui: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run(clone, sys.executable, "src/report.py")
    return Path(shutil.copy(clone / "output/report.html", tmp_path_factory.mktemp("report")))


def test_the_report_has_all_figures_and_no_outside_sources(report: Path, ui: str, shown: dict) -> None:
    text = report.read_text()
    for name, data in shown.items():
        assert f"<th>{name}</th>" in text
        assert f"{fid(data):.4g}" in text
    assert "<td>train.diffusion.schedule</td>" in text
    assert "<td>train.batch_size</td>" not in text  # it is the same everywhere
    sources = re.findall(r"""(?:src|href)=["']([^"']{1,40})""", text)
    assert len(sources) > 10
    assert all(source.startswith(("data:", "#", f"{ui.partition('#')[0]}#/")) for source in sources)


@needs_chromium
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_the_report_is_whole_without_a_network(report: Path, scheme: str, width: int) -> None:
    with browser.chromium() as chromium:
        page, faults = browser.report(chromium, report, color_scheme=scheme, viewport={"width": width, "height": 800})
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        widths = page.locator("img").evaluate_all("images => images.map(image => image.naturalWidth)")
        assert len(widths) == 12  # four pictures of three experiments
        assert min(widths) > 50
        assert page.locator("svg").count() == 3
        ink, paper = page.evaluate("['color', 'backgroundColor'].map(name => getComputedStyle(document.body)[name])")
        brightness = [sum(map(int, re.findall(r"\d+", colour)[:3])) for colour in (ink, paper)]
        assert (brightness[0] < brightness[1]) == (scheme == "light")
        assert abs(brightness[0] - brightness[1]) > 400
        assert faults == []


def test_the_report_of_chosen_experiments(clone: Path) -> None:
    assert run(clone, "python", "src/report.py", "few-steps").strip() == "output/report.html: few-steps"
    assert (clone / "output/report.html").read_text().count("<figure>") == 3 + 4
    failed = subprocess.run(["python", "src/report.py", "x"], cwd=clone, env=ENVIRONMENT, capture_output=True, text=True)
    assert failed.returncode == 1
    assert failed.stderr == "error: no finished experiment is called x; `make compare` lists them\n"
