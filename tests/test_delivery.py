"""Runs sent to real MLflow stores: what these refuse, aren't ready for or are too old for holds up nothing else."""

import http.client
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from filelock import FileLock
from mlflow.artifacts import list_artifacts
from mlflow.entities import RunTag, ViewType
from mlflow.exceptions import MlflowException

from ddpm.errors import UserError
from ddpm.tracking import registry
from ddpm.tracking import run as runs_module
from ddpm.tracking import store as store_module
from ddpm.tracking.client import connect
from ddpm.tracking.connection import EXPERIMENT, MODEL_NAME, Answer, answer
from ddpm.tracking.registry import champion
from ddpm.tracking.run import Run, ship, start_run
from helpers import TRACKING_VARIABLES, Server, free_port, picture, runs

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[1]
STEPS = range(1, 31)
SAMPLING = {
    "sampler": "ddim", "steps": 7, "spacing": "tapered", "eta": 0.0, "variance": "small", "clip": True,
    "guidance_scale": 1.0, "guidance_interval": None, "classes": "all", "count": 1000, "seed": 3,
}  # fmt: skip
PARTS = ("params", "metrics", "tags", "dataset", "model", "previews", "files", "version")


@pytest.fixture(autouse=True)
def environment(monkeypatch, tmp_path):
    for name in (*TRACKING_VARIABLES, "MLFLOW_EXPERIMENT_ID", "DVC_EXP_BASELINE_REV"):
        monkeypatch.delenv(name, raising=False)
    for name, seconds in (("SHIP_SECONDS", 0.05), ("RETRY_SECONDS", 0.2)):
        monkeypatch.setattr(runs_module, name, seconds)
    monkeypatch.setattr(store_module, "EXIT_SECONDS", 1)
    monkeypatch.setattr(registry, "LIBRARY", registry.TRACKING)  # a version takes a copy of the library; a part is quicker


@contextmanager
def evaluation(root: Path, marker: str) -> Iterator[Run]:
    """A run that logs a part of each kind. What the block does comes between its beginning and its end."""
    params = {"evaluate": {"cursed": "test"}, "sample": dict(SAMPLING)}
    with start_run("evaluate", params, root, root / ".resume" / marker, checkpoint_sha256=marker) as run:
        run.tags({"marker": marker, "samples": 1000, "evaluator_sha256": "e", "cursed": "tag"})
        run.dataset("FashionMNIST", "0123456789abcdef", "data/raw", {}, "evaluation")
        run.model({"train": {"seed": 1}}, {"checkpoint_sha256": marker})
        for step in STEPS[:15]:
            run.metrics(step, {"eval/loss": 1 / step})
        run.preview(1, picture(1))
        yield run
        for step in STEPS[15:]:
            run.metrics(step, {"eval/loss": 1 / step})
        run.preview(2, picture(2))
        run.metrics(0, {"eval/cursed": 1.0, "eval/fid": 0.5})
        (root / "card.json").write_text("{}")
        run.artifact(root / "card.json", "model")
        run.register(b"weights of " + marker.encode(), SAMPLING)
    assert run.thread
    run.thread.join(30)  # it may go on for a moment, where a stage would have ended


def sent(run: Run, files: bool = True) -> None:
    """Return once the store has all that was logged so far, or refused it."""
    deadline = time.monotonic() + 60
    while (run.queue or (files and run.store.waiting)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not run.queue, run.store.problem


def found(client, marker: str, experiment: str = EXPERIMENT) -> dict[str, bool]:
    """Which parts of an `evaluation` the store has, each of them whole and once. It has to say that it is finished."""
    (run,) = runs(client, f"tags.marker = '{marker}'", experiment)
    assert run.info.status == "FINISHED"
    losses = sorted((m.step, m.value) for m in client.get_metric_history(run.info.run_id, "eval/loss"))
    images, files = (
        [file.path for file in list_artifacts(f"{run.info.artifact_uri}/{folder}", tracking_uri=client.tracking_uri)]
        for folder in ("images", "model")
    )
    version = client.search_model_versions(f"name = '{MODEL_NAME}' and tags.checkpoint_sha256 = '{marker}'")
    assert len(version) <= 1 and len(losses) == len(STEPS)
    assert run.data.metrics["eval/fid"] == 0.5 and run.data.tags["samples"] == "1000" and run.data.params["sample.steps"] == "7"
    return {
        "params": len(run.data.params) == len(SAMPLING) + 1,
        "metrics": losses == [(step, 1 / step) for step in STEPS] and {"eval/cursed", "eval/fid"} <= run.data.metrics.keys(),
        "tags": {"samples", "evaluator_sha256", "cursed"} <= run.data.tags.keys(),
        "dataset": len(run.inputs.dataset_inputs) == 1,
        "model": bool(run.outputs) and len(run.outputs.model_outputs) == 1,
        "previews": len([path for path in images if path.endswith(".png")]) == 2,
        "files": [Path(path).name for path in files] == ["card.json"],
        "version": bool(version) and version[0].tags["fid"] == "0.5",
    }


def all_but(*lacking: str) -> dict[str, bool]:
    return {part: part not in lacking for part in PARTS}


def kept(root: Path) -> Path:
    """The folder of the run that is still to be sent."""
    (folder,) = (path for path in (root / ".resume").iterdir() if path.is_dir())
    return folder


# A proxy that refuses something


@dataclass
class Fault:
    """Requests that are answered with a status, without asking the server."""

    method: str
    path: str  # a part of it
    status: int
    body: bytes = b""  # a part of it
    answer: bytes = b'{"error_code": "INVALID_PARAMETER_VALUE", "message": "no, never"}'
    seconds: float = 0  # until the answer


HTML = b"<html>no such page</html>"
DENIED = b'{"error_code": "PERMISSION_DENIED", "message": "no"}'
FILES = "/mlflow-artifacts/artifacts/"
FAULTS = {  # what is refused, what isn't there until that ends, and of it what is there if it began at the end of the run
    "refused": (
        [
            Fault("PUT", "/images/", 413, answer=HTML),  # too large for a proxy
            Fault("PUT", "/model/", 400),
            *(Fault("POST", "runs/log-batch", 400, name) for name in (b'"eval/cursed"', b'"evaluate.cursed"', b'"cursed"')),
            Fault("POST", "runs/log-inputs", 400),
            Fault("POST", "runs/outputs", 400),
        ],
        ["previews", "files", "metrics", "params", "tags", "dataset", "model"],
        ["params", "tags", "dataset", "model"],
    ),
    "later": ([Fault(m, FILES, 503, answer=HTML) for m in ("PUT", "GET")], ["previews", "files", "version"], []),
    "denied": (
        [
            *(Fault(m, FILES, 403, answer=DENIED) for m in ("PUT", "GET")),
            *(Fault(m, "registered-models", 403, answer=DENIED) for m in ("POST", "GET")),
        ],
        ["previews", "files", "version"],
        [],
    ),
}
TOLD = {"refused": "refused sample previews: 413 ", "later": "503 ", "denied": "lacks the permission"}


@dataclass
class Proxy:
    address: str
    faults: list[Fault] = field(default_factory=list)
    away: bool = False
    hanging: threading.Event | None = None  # uploads wait for it
    uploading: threading.Event = field(default_factory=threading.Event)


@contextmanager
def proxy(server: str) -> Iterator[Proxy]:
    """In front of a server. Its address may be used while it has faults."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version, wbufsize = "HTTP/1.1", 1 << 16  # each answer in one piece, else it waits for an acknowledgement

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if proxied.away:
                self.close_connection = True
                return
            for fault in proxied.faults:
                if self.command == fault.method and fault.path in self.path and fault.body in body:
                    time.sleep(fault.seconds)
                    self.respond(fault.status, "text/plain", fault.answer)
                    return
            if proxied.hanging and self.command == "PUT" and FILES in self.path:
                proxied.uploading.set()
                proxied.hanging.wait(60)
            connection = http.client.HTTPConnection(server.removeprefix("http://"))
            headers = {name: value for name, value in self.headers.items() if name not in ("Host", "Accept-Encoding")}
            connection.request(self.command, self.path, body, headers)
            answer = connection.getresponse()
            self.respond(answer.status, answer.headers.get("Content-Type", "text/plain"), answer.read())
            connection.close()

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = handle_any

        def respond(self, status: int, kind: str, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        proxied = Proxy(f"http://127.0.0.1:{listener.server_address[1]}")
        threading.Thread(target=listener.serve_forever, daemon=True).start()
        yield proxied
        listener.shutdown()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("server")
    with Server(f"http://127.0.0.1:{free_port()}", folder, f"sqlite:///{folder / 'server.db'}") as server:
        yield server.address


@pytest.mark.parametrize("when", ["during the run", "at its end", "by ship.py"])
@pytest.mark.parametrize("name", FAULTS)
def test_refused_entries_hold_up_nothing_and_arrive_later(server, tmp_path, monkeypatch, capsys, name, when):
    faults, lacking, before = FAULTS[name]
    marker = f"{name}, {when}"
    with proxy(server) as front:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front.address)
        if when == "by ship.py":
            front.away = True
            with evaluation(tmp_path, marker):
                pass
            front.away, front.faults = False, faults
            with pytest.raises(UserError) as caught:
                ship(kept(tmp_path), tmp_path)
            assert TOLD[name] in f"{caught.value}\n{capsys.readouterr().err}"
        else:
            front.faults = faults if when == "during the run" else []
            with evaluation(tmp_path, marker) as run:
                sent(run, files=when == "at its end")
                front.faults = faults
            *warnings, last = capsys.readouterr().err.splitlines()
            assert any(TOLD[name] in line for line in warnings)
            assert len(set(warnings)) == len(warnings) <= len(lacking), warnings
            assert last.endswith(f"it is kept, and `python src/ship.py {kept(tmp_path)}` sends it")
        there = before if when == "at its end" else []
        front.faults = []
        client = connect(tmp_path)
        assert found(client, marker) == all_but(*(part for part in lacking if part not in there))

        ship(kept(tmp_path), tmp_path)
        assert found(client, marker) == all_but()
        assert not [path for path in (tmp_path / ".resume").iterdir() if path.is_dir()]


@pytest.mark.parametrize(
    ("path", "lacking"),
    [("runs/log-inputs", "dataset"), ("registered-models", "version"), ("logged-models", "model")],
)
def test_features_an_old_server_lacks_are_told_once_and_dropped(server, tmp_path, monkeypatch, capsys, path, lacking):
    with proxy(server) as front:
        front.faults = [Fault(method, path, 404, answer=HTML) for method in ("GET", "POST", "PATCH")]
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front.address)
        with evaluation(tmp_path, f"without {lacking}"):
            pass
        (warning,) = capsys.readouterr().err.splitlines()
        assert "perhaps because it is too old" in warning and "404" in warning
        assert list((tmp_path / ".resume").glob("*/")) == []
        front.faults = []
        assert found(connect(tmp_path), f"without {lacking}") == all_but(lacking)


MLFLOWS = b'{"error_code": "%s", "message": "no"}'
OTHERS = (HTML, b'{"message": "no"}', b'{"detail": "no"}', b"")  # of proxies and gateways


@pytest.mark.parametrize(
    ("meaning", "statuses", "answers"),
    [
        (Answer.LATER, (408, 425, 429, 500, 502, 503, 504), OTHERS),
        (Answer.LATER, (503,), [MLFLOWS % b"TEMPORARILY_UNAVAILABLE"]),
        (Answer.DENIED, (401, 403), OTHERS),
        (Answer.DENIED, (403,), [MLFLOWS % b"PERMISSION_DENIED"]),
        (Answer.REFUSED, (400, 409, 413, 422), OTHERS),
        (Answer.REFUSED, (400,), [MLFLOWS % b"INVALID_PARAMETER_VALUE"]),
        (Answer.REFUSED, (404,), [MLFLOWS % b"RESOURCE_DOES_NOT_EXIST"]),
        (Answer.LACKING, (404, 405, 501), OTHERS),
        (Answer.LACKING, (404,), [MLFLOWS % b"ENDPOINT_NOT_FOUND"]),
    ],
)
def test_what_an_answer_means(server, tmp_path, monkeypatch, meaning, statuses, answers):
    """Whether MLflow wrote it or a proxy before it."""
    with proxy(server) as front:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front.address)
        client = connect(tmp_path)
        for status in statuses:
            for content in answers:
                front.faults = [Fault("POST", "runs/log-batch", status, answer=content)]
                with pytest.raises(MlflowException) as caught:
                    client.log_batch("0", tags=[RunTag("a", "b")])
                assert answer(caught.value) is meaning, (status, content)


def test_the_end_of_a_run_waits_for_no_file(server, tmp_path, monkeypatch):
    """Of many, each of which is denied after a while."""
    with proxy(server) as front:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front.address)
        with start_run("train", {}, tmp_path, tmp_path / "run") as run:
            run.tags({"marker": "many"})
            sent(run)
            front.faults = [Fault(method, FILES, 403, answer=DENIED, seconds=0.3) for method in ("GET", "PUT")]
            for step in range(40):
                run.preview(step, picture(step))
            time.sleep(1)
            run.metrics(1, {"train/loss": 1.0})
        (stored,) = runs(connect(tmp_path), "tags.marker = 'many'")
        assert (stored.info.status, stored.data.metrics["train/loss"]) == ("FINISHED", 1.0)
        run.thread.join(30)


def test_while_an_upload_hangs_metrics_arrive_and_the_run_ends(server, tmp_path, monkeypatch, capsys):
    def wait_for(condition: str) -> None:
        deadline = time.monotonic() + 60
        while not runs(client, f"tags.marker = 'hangs' and {condition}"):
            assert time.monotonic() < deadline
            time.sleep(0.1)

    def release_at_the_end() -> None:
        wait_for("metrics.`eval/fid` > 0 and status = 'FINISHED'")
        front.hanging.set()

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_TIMEOUT", "120")
    with proxy(server) as front, ThreadPoolExecutor() as pool:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front.address)
        client = connect(tmp_path)
        front.hanging = threading.Event()
        with evaluation(tmp_path, "hangs") as run:
            sent(run, files=False)
            assert front.uploading.wait(60)
            run.metrics(0, {"eval/late": 1.0})
            wait_for("metrics.`eval/late` > 0")
            released = pool.submit(release_at_the_end)
        released.result()
        assert found(client, "hangs") == all_but()
        assert capsys.readouterr().err == ""


# Old servers and databases


@pytest.fixture(scope="session")
def old_mlflow() -> Path:
    """The interpreter of an environment with an MLflow that teams and hosted services still have."""
    folder = ROOT / ".cache/mlflow-2.22"
    with FileLock(f"{folder}.lock"):
        python = folder / "bin/python"
        if not (folder / "bin/mlflow").exists():
            shutil.rmtree(folder, ignore_errors=True)
            uv = [sys.executable, "-m", "uv"]
            try:
                subprocess.run([*uv, "venv", "-q", "--python", sys.executable, folder], check=True)
                packages = ["mlflow==2.22.*", "sqlalchemy<2.1"]
                subprocess.run([*uv, "pip", "install", "-q", "--python", python, *packages], check=True)
            except subprocess.SubprocessError as error:
                shutil.rmtree(folder, ignore_errors=True)
                pytest.skip(f"MLflow 2.22 can't be installed here: {error}")
    return python


def test_an_old_server_gets_all_it_knows_and_its_database_is_upgraded(old_mlflow, tmp_path, monkeypatch, capsys):
    server = Server(f"http://127.0.0.1:{free_port()}", tmp_path, f"sqlite:///{tmp_path}/old.db", python=old_mlflow)
    with server, proxy(server.address) as front:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", front.address)
        with evaluation(tmp_path, "old") as run:
            sent(run)
        warnings = capsys.readouterr().err  # on a busy machine also that the server was slow
        assert warnings.count("can't take the model in the tab Models, perhaps because it is too old") == 1
        assert found(connect(tmp_path), "old") == all_but("model")
        assert champion(tmp_path)[0] == f"{MODEL_NAME}, version 1"

        front.away = True
        with evaluation(tmp_path, "old and away"):
            pass
        front.away = False
        ship(kept(tmp_path), tmp_path)
        assert found(connect(tmp_path), "old and away") == all_but("model")

    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    (tmp_path / "old.db").rename(tmp_path / "mlflow.db")
    capsys.readouterr()
    with evaluation(tmp_path, "upgraded"):
        pass
    assert capsys.readouterr().err.startswith("note: mlflow.db was upgraded to MLflow 3.")
    with closing(sqlite3.connect(next(tmp_path.glob("mlflow-before-upgrade-*.db")))) as copy:
        assert copy.execute("SELECT count(*) FROM runs").fetchone() == (2,)
    client = connect(tmp_path)
    assert len(runs(client, "tags.stage = 'evaluate'")) == 3
    with evaluation(tmp_path, "again"):
        pass
    assert "upgraded" not in capsys.readouterr().err


@pytest.mark.parametrize("content", [b"", b"not a database, though it says so" * 100])
def test_an_empty_database_is_filled_and_a_damaged_one_told(tmp_path, capsys, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    with evaluation(tmp_path, "run"):
        pass
    warnings = capsys.readouterr().err
    if content:
        assert "file is not a database" in warnings
        assert (tmp_path / "mlflow.db").read_bytes() == content
    else:
        assert warnings == ""
        assert found(connect(tmp_path), "run") == all_but()


def test_a_database_of_a_newer_mlflow_is_left_alone_and_told(tmp_path, capsys):
    with evaluation(tmp_path, "first"):
        pass
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as database, database:
        database.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")
    with pytest.raises(
        UserError, match=rf"^{tmp_path}/mlflow.db: written by a newer MLflow than 3\..*; install the version that"
    ):
        connect(tmp_path)
    assert [path.name for path in tmp_path.glob("mlflow*.db")] == ["mlflow.db"]


# Artifacts that can't be where they should


@pytest.mark.parametrize(
    ("location", "reason"), [("{folder}/file/artifacts", "Not a directory"), ("s3://bucket", "No module named 'boto")]
)
def test_unwritable_artifact_locations_hold_up_only_files(server, tmp_path, monkeypatch, capsys, location, reason):
    """The server leaves the files to its clients, whose machines lack the folder, or the library for the bucket."""
    (file := tmp_path / "file").write_text("")
    marker = experiment = f"files in {location[:4]}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", server)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", experiment)
    client = connect(tmp_path)
    client.create_experiment(experiment, artifact_location=location.format(folder=tmp_path))
    with evaluation(tmp_path, marker) as run:
        sent(run)
    warnings = capsys.readouterr().err.splitlines()
    assert [reason in line for line in warnings] == [True] * 4, warnings  # three kinds, and what will send them
    (stored,) = runs(client, f"tags.marker = '{marker}'", experiment)
    assert stored.info.status == "FINISHED" and len(client.get_metric_history(stored.info.run_id, "eval/loss")) == len(STEPS)
    if location.startswith("s3"):
        with pytest.raises(UserError, match=reason):
            ship(kept(tmp_path), tmp_path)
    else:
        assert found(client, marker, experiment) == all_but("previews", "files", "version")
        file.unlink()
        file.mkdir()
        ship(kept(tmp_path), tmp_path)
        assert found(client, marker, experiment) == all_but()


# A repository that moves


def test_a_moved_repository_finds_its_old_runs_and_keeps_its_new_ones(tmp_path, capsys):
    (first := tmp_path / "first place").mkdir()
    with evaluation(first, "before"):
        pass
    second = first.rename(tmp_path / "second")
    (first).write_text("in the way")
    assert champion(second)[1].read_bytes() == b"weights of before"
    note = capsys.readouterr().err
    assert note.startswith(
        f"note: mlflow.db named artifacts in {first}, and now names those in {second}; mlflow-before-move.db is"
    )
    with evaluation(second, "after"):
        pass
    client = connect(second)
    for marker in ("before", "after"):
        assert found(client, marker) == all_but()
        (run,) = runs(client, f"tags.marker = '{marker}'")
        assert run.info.artifact_uri.startswith(second.as_uri())
    assert capsys.readouterr().err == ""
    assert first.read_text() == "in the way"
    with closing(sqlite3.connect(second / "mlflow-before-move.db")) as copy:
        assert copy.execute("SELECT artifact_uri FROM runs").fetchone()[0].startswith(first.as_uri())


def test_a_copied_repository_has_its_own_files(tmp_path, capsys):
    (first := tmp_path / "first").mkdir()
    with evaluation(first, "before"):
        pass
    second = shutil.copytree(first, tmp_path / "second")
    with evaluation(second, "after"):
        pass
    assert found(connect(second), "after") == all_but()
    assert len(list((first / "mlartifacts").rglob("card.json"))) == 1
    assert len(list((second / "mlartifacts").rglob("card.json"))) == 2
    assert capsys.readouterr().err.count("note: ") == 1
    assert found(connect(first), "before") == all_but()
    assert capsys.readouterr().err == ""


def test_a_shared_database_and_its_lost_folder_stay_as_they_are(tmp_path, monkeypatch, capsys):
    (first := tmp_path / "first").mkdir()
    (second := tmp_path / "second").mkdir()
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/shared.db")
    with evaluation(first, "before"):
        pass
    shutil.rmtree(first)
    with evaluation(second, "after"):
        pass
    assert f"{first}: this folder, which had the experiment's artifacts, doesn't exist" in capsys.readouterr().err
    assert not first.exists()
    (run,) = runs(connect(second), "tags.marker = 'after'")
    assert run.info.status == "FINISHED" and run.data.metrics["eval/fid"] == 0.5
    first.mkdir()
    ship(kept(second), second)
    assert found(connect(second), "after") == all_but()


# What somebody deleted


def test_a_deleted_run_stays_deleted_until_it_is_restored(tmp_path, capsys):
    with evaluation(tmp_path, "deleted") as run:
        sent(run)
        client = connect(tmp_path)
        client.delete_run(run.store.run.run_id)
    first, last = capsys.readouterr().err.splitlines()
    assert first.endswith(
        "somebody deleted this run in MLflow; restore it there first; the run continues and sends everything once this is fixed"
    )
    assert last.endswith(f"`python src/ship.py {kept(tmp_path)}` sends it")
    assert runs(client, "") == []
    with pytest.raises(UserError, match="somebody deleted this run in MLflow; restore it there first"):
        ship(kept(tmp_path), tmp_path)
    assert runs(client, "") == []
    client.restore_run(run.store.run.run_id)
    ship(kept(tmp_path), tmp_path)
    assert found(client, "deleted") == all_but()


def test_nothing_goes_into_a_deleted_experiment(tmp_path, capsys, monkeypatch):
    client = connect(tmp_path)
    experiment = client.create_experiment(EXPERIMENT, artifact_location=(tmp_path / "mlartifacts" / EXPERIMENT).as_uri())
    client.delete_experiment(experiment)
    with evaluation(tmp_path, "waiting"):
        pass
    reason = f"the experiment {EXPERIMENT} was deleted; restore it in MLflow, or name another in MLFLOW_EXPERIMENT_NAME"
    first, last = capsys.readouterr().err.splitlines()
    assert reason in first and reason in last
    folder = kept(tmp_path)
    with pytest.raises(UserError, match="was deleted"):
        ship(folder, tmp_path)
    assert client.search_runs([experiment], run_view_type=ViewType.ALL) == []
    again = shutil.copytree(folder, folder.with_name("copy"))
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "another")
    ship(again, tmp_path)
    assert found(client, "waiting", "another") == all_but()
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME")
    client.delete_registered_model(MODEL_NAME)
    client.restore_experiment(experiment)
    ship(folder, tmp_path)
    assert found(client, "waiting") == all_but()


def test_an_experiment_may_be_named_by_its_id(tmp_path, monkeypatch, capsys):
    client = connect(tmp_path)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", client.create_experiment("by id", artifact_location=(tmp_path / "own").as_uri()))
    with evaluation(tmp_path, "id"):
        pass
    assert found(client, "id", "by id") == all_but()
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "77")
    reason = r"^MLflow at .*: MLFLOW_EXPERIMENT_ID: there is no experiment 77; "
    with pytest.raises(UserError, match=reason), start_run("train", {}, tmp_path, tmp_path / "run", required=True):
        raise AssertionError("it began")
