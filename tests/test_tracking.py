"""Tracking against real MLflow stores: what a run leaves there, however it ends and whatever the store does meanwhile."""

import errno
import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm.errors import Stopped, UserError
from ddpm.runtime.run_folder import lock_folder, remove_states
from ddpm.tracking import connection, store
from ddpm.tracking import run as runs_module
from ddpm.tracking.connection import tracking_uri
from ddpm.tracking.journal import Journal
from ddpm.tracking.run import Run
from helpers import TRACKING_ENVIRONMENT, TRACKING_VARIABLES, Server, artifacts, free_port, picture, python, runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]


def head_commit() -> str:
    git = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    return git.stdout.strip() or "unknown"


HEAD = head_commit()


@pytest.fixture(scope="module", autouse=True)
def environment():
    with pytest.MonkeyPatch.context() as patch:
        for name in TRACKING_VARIABLES:
            patch.delenv(name, raising=False)
        yield


@contextmanager
def start_run(stage: str, params: dict, root: Path, folder: Path | None = None, **options) -> Iterator[Run]:
    """A run with a folder of its own, where none is named."""
    with runs_module.start_run(stage, params, root, folder or root / ".resume" / uuid.uuid4().hex[:16], **options) as run:
        yield run


WHOLE_RUN = """
import os, sys, time
from pathlib import Path

import torch  # as in the real stages, before the run starts
from ddpm.tracking.run import start_run

sys.path.append("tests")
from helpers import PARAMS, picture

root, files = Path(sys.argv[1]), Path(sys.argv[2])
files.mkdir()
(files / "model.pth").write_bytes(bytes(range(256)) * 1000)
os.environ["DVC_EXP_NAME"] = "bold-name"
began = time.monotonic()
with start_run("train", PARAMS, root, root / ".resume" / "whole", device="cuda:7") as run:
    run.dataset("fashion-mnist", "0123456789abcdef", "data/raw", {"train_images": 60000}, "training")
    for step in range(0, 41):
        run.metrics(step, {"train/loss": 1 / (step + 1), "train/loss_2": step * 1e-30})
        if step % 20 == 0:
            run.preview(step, picture(seed=step))
    run.metrics(40, {"val/none": float("nan"), "val/all": float("inf")})
    run.artifact(files / "model.pth", "model")
    run.artifact(files / "model.pth")
    run.tags({"checkpoint_sha256": "abc", "parameters": 12})
    (files / "model.pth").unlink()  # a run has its own copy
    block = time.monotonic() - began
    if sys.argv[3] == "wait":
        while run.queue:
            time.sleep(0.05)
        time.sleep(2)  # in which the machine's load is looked at
    ending = time.monotonic()
print(block, time.monotonic() - ending)
"""

KILLED_RUN = """
import os, signal, sys, time
from pathlib import Path
from ddpm.tracking.run import start_run

sys.path.append("tests")
from helpers import PARAMS, picture

root = Path(sys.argv[1])
with start_run("train", PARAMS, root, root / ".resume" / "killed") as run:
    run.dataset("fashion-mnist", "fedcba9876543210", "data/raw", {}, "training")
    for step in range(20):
        run.metrics(step, {"train/loss": 100.0 + step})
    run.preview(0, picture(seed=1))
    while run.queue:
        time.sleep(0.05)
    for step in range(20, 30):  # these have not been shipped
        run.metrics(step, {"train/loss": 100.0 + step})
    run.preview(20, picture(seed=1))
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture(scope="module")
def offline(tmp_path_factory):
    """The address of a server that isn't up, the folder, and a process on the way with a run for it; it waits a while."""
    folder, address = tmp_path_factory.mktemp("offline"), f"http://127.0.0.1:{free_port()}"
    process = python(
        *(WHOLE_RUN, folder / "root", folder / "files", "leave"),
        MLFLOW_TRACKING_URI=address,
        MLFLOW_EXPERIMENT_NAME="elsewhere",
    )
    yield address, folder, process
    process.kill()
    process.communicate()


@pytest.fixture(scope="module")
def root(tmp_path_factory, offline):
    """A folder whose store two processes created at once: one run was finished there, and one killed on the way."""
    root = tmp_path_factory.mktemp("root")
    whole, killed = python(WHOLE_RUN, root, root / "files", "wait"), python(KILLED_RUN, root)
    (_, errors), (_, other_errors) = whole.communicate(timeout=120), killed.communicate(timeout=120)
    assert whole.returncode == 0, errors
    assert killed.returncode == -signal.SIGKILL, other_errors
    assert "warning" not in errors + other_errors
    return root


@pytest.fixture(scope="module")
def client(root):
    import mlflow

    return mlflow.MlflowClient(tracking_uri(root))


def one(client, condition: str, experiment: str = connection.EXPERIMENT):
    (run,) = runs(client, condition, experiment)
    return run


def history(client, run, name: str) -> list[tuple[int, float]]:
    return sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, name))


def previews(client, run) -> list[int]:
    """The steps of the pictures under a run's images, thumbnails aside."""
    return sorted(int(re.search(r"step\W(\d+)\W", p)[1]) for p in artifacts(client, run, "images") if p.endswith(".png"))


def check_whole_run(client, run, seeds: tuple[int, ...] = (0, 20, 40)) -> None:
    """Whether the store has all that WHOLE_RUN logged, once."""
    import mlflow

    assert run.info.status == "FINISHED"
    assert run.info.end_time >= run.info.start_time
    assert run.info.run_name == "train bold-name"
    assert run.data.params == {
        "train.steps": "40", "train.model.channels": "[8, 16]", "train.gamma": "None", "runtime.device": "cpu",
    }  # fmt: skip
    assert history(client, run, "train/loss") == [(step, 1 / (step + 1)) for step in range(41)]
    assert history(client, run, "train/loss_2") == [(step, step * 1e-30) for step in range(41)]
    assert len(history(client, run, "val/none")) == len(history(client, run, "val/all")) == 1
    tags = run.data.tags
    for name, value in {
        "stage": "train", "device": "cuda:7", "dvc_exp_name": "bold-name", "checkpoint_sha256": "abc", "parameters": "12",
    }.items():  # fmt: skip
        assert tags[name] == value
    assert tags["mlflow.source.git.commit"] in (HEAD, head_commit())  # a commit may be made meanwhile
    assert tags["python"] == ".".join(map(str, sys.version_info[:3]))
    (dataset,) = run.inputs.dataset_inputs
    assert (dataset.dataset.name, dataset.dataset.digest) == ("fashion-mnist", "0123456789abcdef")
    assert json.loads(dataset.dataset.profile) == {"train_images": 60000}
    assert dataset.tags[0].value == "training"

    assert previews(client, run) == [0, 20, 40]
    assert {"images", "model", "model.pth"} == set(artifacts(client, run))
    assert artifacts(client, run, "model") == ["model/model.pth"]
    folder = Path(mlflow.artifacts.download_artifacts(run_id=run.info.run_id, tracking_uri=client.tracking_uri))
    for name in ("model/model.pth", "model.pth"):
        assert (folder / name).read_bytes() == bytes(range(256)) * 1000
    for seed in seeds:
        (file,) = folder.glob(f"images/*step?{seed}?timestamp*.png")
        expected = np.random.default_rng(seed).integers(0, 256, (20, 30), np.uint8)
        assert np.array_equal(np.asarray(Image.open(file).convert("L")), expected)


@pytest.mark.parametrize(
    ("variable", "expected"),
    [
        (None, "sqlite:////somewhere/mlflow.db"),
        ("", "sqlite:////somewhere/mlflow.db"),
        ("sqlite:///other.db", "sqlite:////somewhere/other.db"),
        ("sqlite:///sub/other.db", "sqlite:////somewhere/sub/other.db"),
        ("sqlite:////absolute/other.db", "sqlite:////absolute/other.db"),
        ("http://127.0.0.1:5000", "http://127.0.0.1:5000"),
        ("https://user@host/path", "https://user@host/path"),
        ("postgresql://host/db", "postgresql://host/db"),
    ],
)
def test_tracking_uri(monkeypatch, variable, expected):
    if variable is not None:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", variable)
    assert tracking_uri(Path("/somewhere")) == expected


def test_mlflow_neither_calls_home_nor_waits_for_a_dead_server():
    """Its defaults are set before it is imported, by the module that all others import first."""
    program = "import os, sys; import ddpm.tracking.connection as c; assert 'mlflow' not in sys.modules; print(dict(os.environ))"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MLFLOW_")} | {
        "PYTHONPATH": str(ROOT / "src")
    }
    done = subprocess.run([sys.executable, "-c", program], env=clean, capture_output=True, text=True, check=True)
    for setting in ("DISABLE_TELEMETRY': 'true", "HTTP_REQUEST_MAX_RETRIES': '0", "HTTP_REQUEST_TIMEOUT': '5"):
        assert f"'MLFLOW_{setting}'" in done.stdout


def test_a_finished_run_is_all_in_the_store(root, client):
    run = one(client, "tags.dvc_exp_name = 'bold-name'")
    check_whole_run(client, run)
    assert any(name.startswith("system/cpu") for name in run.data.metrics)
    assert not (root / ".resume" / "whole").exists()
    assert Path(run.info.artifact_uri.removeprefix("file://")).is_relative_to(root / "mlartifacts")


def test_a_killed_run_goes_on_where_it_was(root, client):
    """Every step once; what the journal had keeps its value, also where the steps are computed again."""
    folder, count = root / ".resume" / "killed", len(runs(client, ""))
    before = one(client, "tags.journal = '{}'".format(Journal(folder).entries[0]["start"]["journal"]))
    assert before.info.status == "RUNNING"
    assert history(client, before, "train/loss") == [(step, 100.0 + step) for step in range(20)]
    with (folder / "journal.jsonl").open("a") as file:
        file.write('{"metric": "train/loss", "value": 13')  # as if killed while writing

    with start_run("train", {"other": 1}, root, folder) as run:
        run.dataset("fashion-mnist", "fedcba9876543210", "data/raw", {}, "training")
        for step in range(10, 40):
            run.metrics(step, {"train/loss": 200.0 + step})
        for step in (0, 20, 40):
            run.preview(step, picture(seed=1))
    after = client.get_run(before.info.run_id)
    assert after.info.status == "FINISHED"
    assert history(client, after, "train/loss") == [(s, (100.0 if s < 30 else 200.0) + s) for s in range(40)]
    assert previews(client, after) == [0, 20, 40]
    assert after.data.params == before.data.params
    assert len(after.inputs.dataset_inputs) == 1
    assert not folder.exists()
    assert len(runs(client, "")) == count


def test_a_torn_last_line_is_dropped_and_the_rest_kept(tmp_path):
    journal = Journal(tmp_path)
    for step in range(5):
        journal.append({"metric": "a", "value": 0.5, "step": step})
    journal.file.close()
    whole = journal.path.read_bytes()
    for cut in random.Random(0).sample(range(len(whole)), 20):
        journal.path.write_bytes(whole[:cut])
        again = Journal(tmp_path)
        assert [e["step"] for e in again.entries] == list(range(whole[:cut].count(b"\n")))
        again.append({"metric": "b"})
        again.file.close()
        assert Journal(tmp_path).entries[-1] == {"metric": "b"}
    for garbage in (b"\0" * 50, b"\0" * 50 + b"\n", b'{"metric": "a"\n{"metric": "a"}\n', b"\xff\xfe\n"):
        journal.path.write_bytes(whole + garbage)  # as after a power cut
        again = Journal(tmp_path)
        again.file.close()
        assert [e["step"] for e in again.entries] == list(range(5))
        assert journal.path.read_bytes() == whole


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="no /proc")
def test_what_is_synced_is_on_the_disk(tmp_path, monkeypatch):
    synced = set()
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.add(Path(f"/proc/self/fd/{descriptor}").readlink()))
    journal = Journal(tmp_path / "run")
    deposited = journal.deposit("a.png", b"image")
    hidden = journal.outbox / f".{deposited.partition('/')[0]}"
    assert synced == {hidden / "a.png", hidden}
    journal.append({"preview": deposited})
    journal.sync()
    assert {journal.path, journal.outbox, journal.folder, tmp_path} <= synced


def test_only_synced_entries_are_shipped(root, client, monkeypatch):
    """What the store has, the journal must have: else a resumed run would log it again, at another time."""
    synced, shipped = [], []
    sync, send_main = Journal.sync, store.Store.send_main

    def watched_sync(journal: Journal) -> None:
        size = journal.size
        sync(journal)
        synced.append(size)

    def watched_send(self: store.Store, queue, count: int) -> None:
        lines = [json.dumps(entry) + "\n" for entry in list(queue)[:count]]
        shipped.extend(lines)
        assert len("".join(shipped)) <= synced[-1]
        send_main(self, queue, count)

    monkeypatch.setattr(Journal, "sync", watched_sync)
    monkeypatch.setattr(store.Store, "send_main", watched_send)
    with start_run("sample", {}, root) as run:
        for step in range(100):
            run.metrics(step, {"a": float(step)})
            time.sleep(0.01)
    assert len(shipped) == 102


def test_a_problem_of_files_does_not_end_the_wait_for_metrics(root, tmp_path, monkeypatch):
    monkeypatch.setattr(store, "EXIT_SECONDS", 0.2)
    start = {"params": {}, "journal": "", "stage": "evaluate"}
    held_up, done = store.Store(root, Journal(tmp_path / "run"), start), threading.Event()
    held_up.side.problem = "denied"
    queue = deque([{"metric": "a"}])
    sender = threading.Thread(target=done.wait)
    sender.start()
    waiting = threading.Thread(target=held_up.wait_for, args=(sender, queue))
    waiting.start()
    time.sleep(1)
    assert waiting.is_alive() and not held_up.given_up
    queue.clear()
    waiting.join(10)
    assert held_up.given_up and sender.is_alive()
    done.set()
    sender.join()


class FullDisk:
    """A file that takes some bytes of a line, and no more."""

    def __init__(self, file, room: int):
        self.file, self.room = file, room

    def write(self, data: bytes) -> int:
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return self.file.write(data[: self.room])

    def __getattr__(self, name: str):
        return getattr(self.file, name)


@pytest.mark.parametrize("room", [0, 5])
def test_a_journal_on_a_full_disk_says_so_and_keeps_whole_lines(tmp_path, room):
    journal = Journal(tmp_path)
    journal.append({"metric": "a"})
    file, journal.file = journal.file, FullDisk(journal.file, room)
    with pytest.raises(UserError) as caught:
        journal.append({"metric": "b"})
    assert str(caught.value) == f"{tmp_path}/journal.jsonl: can't be written (No space left on device)"
    journal.file = file  # there is room again
    journal.append({"metric": "c"})
    file.close()
    assert Journal(tmp_path).entries == [{"metric": "a"}, {"metric": "c"}]


@pytest.mark.parametrize(
    ("error", "status"),
    [(ValueError("no"), "FAILED"), (UserError("no"), "FAILED"), (Stopped(15), "KILLED"), (SystemExit(3), "KILLED")],
)
def test_how_a_run_ends(root, client, error, status):
    with pytest.raises(type(error)), start_run("sample", {}, root) as run:
        run.metrics(0, {"sample/seconds": 1.0})
        run.tags({"marker": status + type(error).__name__})
        folder = run.journal.folder
        raise error
    ended = one(client, f"tags.marker = '{status}{type(error).__name__}'")
    assert ended.info.status == status
    assert ended.data.metrics == {"sample/seconds": 1.0}
    assert (folder / "journal.jsonl").exists()  # the same command goes on with it


def test_a_resumed_run_is_the_same_mlflow_run(root, client):
    folder = root / ".resume" / "stopped"
    with pytest.raises(Stopped), start_run("train", {}, root, folder) as run:
        run.metrics(1, {"train/loss": 1.0})
        run.tags({"marker": "stopped"})
        raise Stopped(signal.SIGTERM)
    stopped = one(client, "tags.marker = 'stopped'")
    assert stopped.info.status == "KILLED"
    assert (folder / "journal.jsonl").exists()
    with start_run("train", {}, root, folder) as run:
        run.metrics(1, {"train/loss": 2.0})
        run.metrics(2, {"train/loss": 2.0})
    finished = client.get_run(stopped.info.run_id)
    assert finished.info.status == "FINISHED"
    assert history(client, finished, "train/loss") == [(1, 1.0), (2, 2.0)]


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("started", [False, True])
def test_a_signal_while_the_thread_that_ships_is_started(root, client, monkeypatch, capfd, started):
    """Before the thread is there, or before it has begun."""
    start, marker = threading._start_new_thread, f"interrupted start {started}"

    def interrupted(bootstrap: Callable[[], None], arguments: tuple) -> None:
        monkeypatch.setattr(threading, "_start_new_thread", start)
        if started:
            start(lambda: (time.sleep(0.2), bootstrap()), arguments)
        raise Stopped(signal.SIGINT)

    folder = root / ".resume" / marker
    monkeypatch.setattr(threading, "_start_new_thread", interrupted)
    with pytest.raises(Stopped), start_run("train", {}, root, folder):
        pass
    stopped = runs(client, "attributes.status = 'KILLED'")[0]
    assert stopped.data.tags["journal"] == next(e["start"]["journal"] for e in Journal(folder).entries if "start" in e)
    time.sleep(0.5)
    assert capfd.readouterr().err == ""
    with start_run("train", {}, root, folder):
        pass
    assert client.get_run(stopped.info.run_id).info.status == "FINISHED"


def test_a_run_killed_during_its_cleanup_stays_one_run(root, client, monkeypatch):
    def killed(_folder: Path) -> None:
        raise Stopped(signal.SIGTERM)

    folder = root / ".resume" / "last"
    monkeypatch.setattr(shutil, "rmtree", killed)
    remove = partial(remove_states, folder)
    with pytest.raises(Stopped), start_run("train", {}, root, folder, on_finished=remove) as run:
        (folder / "state-00000010.pt").write_bytes(b"state")
        run.metrics(1, {"train/loss": 1.0})
        run.tags({"marker": "last"})
    monkeypatch.undo()
    assert not list(folder.glob("*.pt"))  # whoever finds it begins anew, and every step has its journalled value
    with start_run("train", {}, root, folder) as run:
        run.metrics(1, {"train/loss": 2.0})
        run.metrics(2, {"train/loss": 2.0})
    assert history(client, one(client, "tags.marker = 'last'"), "train/loss") == [(1, 1.0), (2, 2.0)]
    assert not folder.exists()


def test_shipping_a_journal_again_makes_no_doubles(root, client, monkeypatch):
    def away(_store: store.Store) -> None:
        raise ConnectionError

    (root / "artifact.txt").write_text("text")
    monkeypatch.setattr(store.Store, "open", away)
    with start_run("evaluate", {"a": 1}, root) as run:
        run.dataset("fashion-mnist", "0123", "data/raw", {}, "evaluation")
        for step in range(5):
            run.metrics(step, {"eval/fid": float(step), "eval/kid": float("nan")})
        run.preview(3, picture(0))
        run.artifact(root / "artifact.txt")
        run.tags({"marker": "twice"})
    run.thread.join(10)
    monkeypatch.undo()
    (kept,) = (root / ".resume").glob("unshipped-*/")
    for folder in (shutil.copytree(kept, root / ".resume" / "copy"), kept):
        assert runs_module.ship(folder, root) == f"sqlite:///{root}/mlflow.db"
        assert not folder.exists()
    shipped = one(client, "tags.marker = 'twice'")
    assert shipped.info.status == "FINISHED"
    assert Counter(m.step for m in client.get_metric_history(shipped.info.run_id, "eval/fid")) == dict.fromkeys(range(5), 1)
    assert Counter(m.step for m in client.get_metric_history(shipped.info.run_id, "eval/kid")) == dict.fromkeys(range(5), 1)
    assert previews(client, shipped) == [3]
    assert len(shipped.inputs.dataset_inputs) == 1


def test_shipping_an_interrupted_run_keeps_its_states(root, client):
    folder = root / ".resume" / "interrupted"
    with pytest.raises(KeyboardInterrupt), start_run("train", {}, root, folder) as run:
        (folder / "state-00000010.pt").write_bytes(b"state")
        run.metrics(1, {"train/loss": 1.0})
        run.tags({"marker": "interrupted"})
        raise KeyboardInterrupt
    with lock_folder(folder), pytest.raises(UserError, match=f"^{folder}: another process is still running this$"):
        runs_module.ship(folder, root)
    runs_module.ship(folder, root)
    assert (folder / "state-00000010.pt").read_bytes() == b"state"
    assert one(client, "tags.marker = 'interrupted'").info.status == "KILLED"
    with start_run("train", {}, root, folder) as run:
        run.metrics(2, {"train/loss": 2.0})
    assert history(client, one(client, "tags.marker = 'interrupted'"), "train/loss") == [(1, 1.0), (2, 2.0)]


def test_shipping_a_killed_runs_journal_says_that_it_was_killed(root, client):
    folder = root / ".resume" / "shipped"
    with pytest.raises(KeyboardInterrupt), start_run("train", {}, root, folder) as run:
        run.tags({"marker": "shipped"})
        raise KeyboardInterrupt
    journal = folder / "journal.jsonl"
    journal.write_text("".join(line for line in journal.read_text().splitlines(True) if '"end"' not in line))
    runs_module.ship(folder, root)
    assert one(client, "tags.marker = 'shipped'").info.status == "KILLED"


def test_a_run_lost_before_it_had_a_journal_leaves_none(tmp_path):
    runs_module.mark_killed(tmp_path, tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (
            "/nowhere",
            "/nowhere: contains no journal.jsonl; either it was already sent, or the run's warning named another folder",
        ),
        (str(ROOT / "README.md"), f"{ROOT / 'README.md'}: corrupt, or not a zip archive of runs"),
    ],
)
def test_shipping_what_is_no_journal(path, message):
    command = ["python", "src/ship.py", path]
    done = subprocess.run(command, cwd=ROOT, env=TRACKING_ENVIRONMENT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (1, f"error: {message}\n")


def test_entries_may_be_appended_while_leading_metrics_are_taken():
    queue, stop = deque({"metric": "a", "step": step} for step in range(500)), threading.Event()

    def append() -> None:
        while not stop.is_set():
            queue.append({"metric": "a", "step": len(queue)})
            queue.pop()

    thread = threading.Thread(target=append)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    thread.start()
    try:
        for _ in range(300):
            batch = store._leading_metrics(queue, 1000)
            assert [e["step"] for e in batch[:500]] == list(range(500))
            assert len(store._leading_metrics(queue, 7)) == 7
    finally:
        stop.set()
        thread.join()
        sys.setswitchinterval(interval)


def finished_training(root: Path, checkpoint: str, marker: str) -> None:
    with start_run("train", {}, root, root / ".resume" / marker) as run:
        run.tags({"checkpoint_sha256": checkpoint, "marker": marker})


def test_samples_and_evaluations_are_children_of_their_training(root, client):
    finished_training(root, "c1", "older")
    finished_training(root, "c1", "newer")
    finished_training(root, "c2", "another")
    with pytest.raises(ValueError), start_run("train", {}, root, root / ".resume" / "failed") as run:
        run.tags({"checkpoint_sha256": "c1", "marker": "failed"})
        raise ValueError
    for stage, checkpoint in (("sample", "c1"), ("evaluate", "c1"), ("sample", "c9"), ("evaluate", None)):
        with start_run(stage, {}, root, checkpoint_sha256=checkpoint) as run:
            run.tags({"marker": f"{stage} {checkpoint}"})
    parent = one(client, "tags.marker = 'newer'").info.run_id
    for marker in ("sample c1", "evaluate c1"):
        child = one(client, f"tags.marker = '{marker}'")
        assert child.data.tags["mlflow.parentRunId"] == parent
        assert child.data.tags["checkpoint_sha256"] == "c1"
    for marker in ("sample c9", "evaluate None"):
        assert "mlflow.parentRunId" not in one(client, f"tags.marker = '{marker}'").data.tags


def test_the_training_carries_its_best_evaluation(root, client):
    finished_training(root, "best", "best")
    parent = one(client, "tags.marker = 'best'")

    def evaluate(fid: float, samples: int, evaluator: str = "e1") -> str:
        with start_run("evaluate", {}, root, checkpoint_sha256="best") as run:
            run.tags({"samples": samples, "evaluator_sha256": evaluator})
            values = {"eval/fid": fid, "eval/kid": fid / 10}
            run.metrics(0, values)
            run.best_evaluation(values)
        return runs(client, "tags.stage = 'evaluate'")[0].info.run_id

    best = None
    for fid, samples, evaluator, better in (
        (5.0, 1000, "e1", True),  # the first
        (6.0, 1000, "e1", False),
        (5.0, 1000, "e1", False),  # the same again
        (4.0, 1000, "e1", True),
        (4.5, 5000, "e1", False),
        (3.5, 5000, "e1", True),  # more samples
        (1.0, 1000, "e1", False),  # fewer
        (9.0, 100, "e2", True),  # another evaluator's figures don't compare
    ):
        run_id = evaluate(fid, samples, evaluator)
        if better:
            best, expected = run_id, {"eval/fid": fid, "eval/kid": fid / 10}
        now = client.get_run(parent.info.run_id)
        assert now.data.tags["best_evaluation"] == best, (fid, samples, evaluator)
        assert {name: value for name, value in now.data.metrics.items() if name.startswith("eval/")} == expected
        assert (now.info.status, now.info.end_time) == ("FINISHED", parent.info.end_time)


def test_an_evaluation_without_a_training_has_none_to_tell(root, client):
    with start_run("evaluate", {}, root, checkpoint_sha256="made elsewhere") as run:
        run.tags({"samples": 10, "evaluator_sha256": "e", "marker": "alone"})
        run.best_evaluation({"eval/fid": 1.0})
    assert one(client, "tags.marker = 'alone'").info.status == "FINISHED"


def test_an_unreachable_server_delays_nothing_and_gets_all_later(root, offline, tmp_path, monkeypatch):
    """The block goes on, the end waits a little, and the command that the warning names ships all once a server is up."""
    address, _, process = offline
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    block, ending = map(float, output.split())
    assert block < 5
    assert ending < 20
    warning = errors.strip().splitlines()[-1]
    assert warning.startswith(f"warning: MLflow at {address} has not received all of this run")
    assert "(Connection refused); it is kept, and `python src/ship.py " in warning and warning.endswith("` sends it")
    assert errors.strip().splitlines() == [
        f"warning: MLflow at {address}: Connection refused; the run continues and sends everything once the server answers",
        warning,
    ]
    script, folder = warning.split("`")[1].split()[1:]
    assert Path(folder).is_dir() and Path(folder).parent == offline[1] / "root" / ".resume"
    assert not Path(folder).with_name("whole").exists()  # the next run of this configuration is another

    environment = TRACKING_ENVIRONMENT | {"MLFLOW_TRACKING_URI": address, "MLFLOW_EXPERIMENT_NAME": "elsewhere"}
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError, match=f"^MLflow at {address}: Connection refused$"):
        runs_module.ship(Path(folder), root)

    with Server(address, tmp_path, copied(root / "mlflow.db", tmp_path)):
        command = ["python", script, folder]
        shipped = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=120)
        assert shipped.returncode == 0, shipped.stderr
        assert shipped.stdout.endswith(f"sent to MLflow at {address}\n")
        assert not Path(folder).exists()
        import mlflow

        client = mlflow.MlflowClient(address)
        run = one(client, "tags.dvc_exp_name = 'bold-name'", "elsewhere")
        assert run.info.artifact_uri.startswith("mlflow-artifacts:")
        check_whole_run(client, run)


def copied(database: Path, folder: Path) -> str:
    """The store of a server: creating another would take longer."""
    return f"sqlite:///{shutil.copy(database, folder / 'server.db')}"


def test_a_server_with_outages_gets_everything_and_delays_nothing(root, tmp_path, monkeypatch, capsys):
    import mlflow

    address, slowest = f"http://127.0.0.1:{free_port()}", 0.0
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    (tmp_path / "model.pth").write_bytes(b"weights" * 1000)
    server = Server(address, tmp_path, copied(root / "mlflow.db", tmp_path))

    def log(steps: range) -> None:
        nonlocal slowest
        for step in steps:
            began = time.monotonic()
            run.metrics(step, {"train/loss": float(step)})
            if step % 50 == 0:
                run.preview(step, picture(step))
            slowest = max(slowest, time.monotonic() - began)
            time.sleep(0.01)

    def arrived() -> None:
        for _ in range(600):
            if not run.queue:
                return
            time.sleep(0.1)
        raise AssertionError(f"still to be shipped: {len(run.queue)} entries; {run.store.problem}")

    with server, start_run("train", {"a": 1}, tmp_path / "root") as run:
        log(range(0, 100))
        arrived()
        server.signal(signal.SIGSTOP)
        log(range(100, 200))
        run.artifact(tmp_path / "model.pth", "while-it-hung")
        time.sleep(8)  # a request gives up after five
        server.signal(signal.SIGCONT)
        log(range(200, 250))
        arrived()
        server.__exit__()
        log(range(250, 350))
        run.artifact(tmp_path / "model.pth", "while-it-was-dead")
        time.sleep(3)
        server.__enter__()
        log(range(350, 400))
        arrived()
        run.tags({"marker": "back"})
        assert slowest < 1
    assert list((tmp_path / "root/.resume").iterdir()) == []
    warnings = [line for line in capsys.readouterr().err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2 and all(line.startswith(f"warning: MLflow at {address}: ") for line in warnings)

    with server:
        client = mlflow.MlflowClient(address)
        stored = one(client, "tags.marker = 'back'")
        assert stored.info.status == "FINISHED"
        losses = client.get_metric_history(stored.info.run_id, "train/loss")
        assert [(m.step, m.value) for m in sorted(losses, key=lambda m: (m.timestamp, m.step))] == [(s, s) for s in range(400)]
        assert previews(client, stored) == list(range(0, 400, 50))
        for name in ("while-it-hung", "while-it-was-dead"):
            path = client.download_artifacts(stored.info.run_id, f"{name}/model.pth", tmp_path)
            assert Path(path).read_bytes() == b"weights" * 1000


@pytest.fixture
def silent():
    """The address of a server that accepts connections and never answers."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(100)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


def test_a_silent_server_is_told_once_and_delays_no_end(silent, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", silent)
    began, said = time.monotonic(), ""
    with start_run("sample", {}, tmp_path) as run:
        run.metrics(0, {"sample/seconds": 1.0})
        while not said and time.monotonic() - began < 60:
            time.sleep(0.05)
            said += capsys.readouterr().err
        assert said == f"warning: MLflow at {silent}: timed out; the run continues and sends everything once the server answers\n"
        assert time.monotonic() - began < 10
        began = time.monotonic()
    assert time.monotonic() - began < 20
    kept = next(path for path in (tmp_path / ".resume").iterdir() if path.is_dir())
    assert kept.name.startswith("unshipped-")
    assert capsys.readouterr().err == (
        f"warning: MLflow at {silent} has not received all of this run (timed out); "
        f"it is kept, and `python src/ship.py {kept}` sends it\n"
    )
    run.thread.join(10)
    assert not run.thread.is_alive()


def test_where_mlflow_is_required_its_absence_ends_the_stage(tmp_path, monkeypatch, capsys):
    address = f"http://127.0.0.1:{free_port()}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    with pytest.raises(UserError) as caught, start_run("train", {}, tmp_path, required=True):
        raise AssertionError("it began")
    assert (
        str(caught.value) == f"MLflow at {address}: Connection refused; fix the connection, or set runtime.require_mlflow: false"
    )
    assert capsys.readouterr().err == ""


def test_where_mlflow_is_required_and_there_all_is_as_ever(root, client):
    with start_run("sample", {}, root, required=True) as run:
        run.metrics(0, {"a": 1.0})
        run.tags({"marker": "required"})
    assert one(client, "tags.marker = 'required'").data.metrics == {"a": 1.0}


WRITER = """
import sys
from pathlib import Path
from ddpm.tracking.run import start_run

root, number = Path(sys.argv[1]), sys.argv[2]
with start_run("sample", {"number": number}, root, root / ".resume" / f"writer-{number}") as run:
    run.tags({"marker": f"writer {number}"})
    for step in range(2000):
        run.metrics(step, {"a": float(step), "b": -float(step)})
    run.artifact(Path(sys.executable).with_name("mlflow"), "file")
"""


def test_four_at_once_lose_nothing(root, client):
    writers = [python(WRITER, root, n) for n in range(4)]
    for writer in writers:
        _, errors = writer.communicate(timeout=240)
        assert (writer.returncode, errors) == (0, "")
    for n in range(4):
        run = one(client, f"tags.marker = 'writer {n}'")
        assert run.info.status == "FINISHED"
        assert artifacts(client, run, "file") == ["file/mlflow"]
        for name, sign in (("a", 1), ("b", -1)):
            values = [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, name)]
            assert sorted(values) == [(step, sign * step) for step in range(2000)]
