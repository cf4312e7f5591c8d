"""What a team shares, on real services: an MLflow server with passwords on PostgreSQL, and a DVC remote behind SSH.

The server's settings and members are those of docs/OPERATIONS.md: what is pasted from there is what is tested here.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

import crash
from ddpm.errors import UserError
from ddpm.files import file_sha256
from ddpm.tracking.run import ship
from ddpm.tracking.views import FIRST_VIEW, view_key
from helpers import ENVIRONMENT, ROOT, Server, artifacts, copied, free_port, python, run, runs, stages_run

SECTION = (ROOT / "docs/OPERATIONS.md").read_text().partition("## A team's stores")[2]
POSTGRES = max(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: float(path.parent.name), default=None)
SSHD = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
pytestmark = pytest.mark.slow
needs_postgres = pytest.mark.skipif(POSTGRES is None, reason="needs Debian's package postgresql")
needs_sshd = pytest.mark.skipif(SSHD is None, reason="needs Debian's package openssh-server")

ADMIN = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": "password of admin"}
ADA = {"MLFLOW_TRACKING_USERNAME": "ada", "MLFLOW_TRACKING_PASSWORD": "password of ada"}
BOB = {"MLFLOW_TRACKING_USERNAME": "bob", "MLFLOW_TRACKING_PASSWORD": "password of bob"}


def block(language: str) -> str:
    """The one in this language that the section shows."""
    (text,) = re.findall(rf"```{language}\n(.*?)```", SECTION, re.S)
    return text


@pytest.fixture(scope="module")
def database() -> Iterator[str]:
    """The address of an empty PostgreSQL database with a password."""
    root = os.geteuid() == 0  # whom PostgreSQL refuses to run as
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are closed to other users
        (Path(folder) / "password").write_text("secret")
        for path in (folder, f"{folder}/password") if root else ():
            shutil.chown(path, "postgres")

        def postgres(command: str, *options: str) -> None:
            become = ["runuser", "-u", "postgres", "--"] if root else []
            command = [*become, POSTGRES / command, "-D", f"{folder}/data", *options]
            subprocess.run(command, cwd=folder, stdout=subprocess.DEVNULL, check=True)

        postgres("initdb", "--no-sync", "-U", "mlflow", "--auth=scram-sha-256", f"--pwfile={folder}/password")
        settings = f"-F -p {(port := free_port())} -c listen_addresses=127.0.0.1 -c unix_socket_directories="
        postgres("pg_ctl", "start", "-w", "-l", f"{folder}/log", "-o", settings)
        yield f"postgresql://mlflow:secret@127.0.0.1:{port}/postgres"
        postgres("pg_ctl", "stop", "-m", "immediate")


@pytest.fixture(scope="module")
def server(database: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """An MLflow server on it, with the members ada and bob, and eve, who has an account and no role."""
    folder, address = tmp_path_factory.mktemp("server"), f"http://127.0.0.1:{free_port()}"
    settings = re.sub(r"postgresql:\S+", database, block("ini")).replace("PASSWORD", ADMIN["MLFLOW_TRACKING_PASSWORD"])
    (folder / "auth.ini").write_text(settings)
    environment = {"MLFLOW_AUTH_CONFIG_PATH": str(folder / "auth.ini"), "MLFLOW_FLASK_SERVER_SECRET_KEY": "secret"}
    (behind_https,) = re.findall(r"`(--allowed-hosts [^`]+)`", SECTION)
    server = Server(address, folder, database, "--app-name", "basic-auth", *behind_https.split(), **environment)
    with server, pytest.MonkeyPatch.context() as patch:
        for name, value in ADMIN.items():
            patch.setenv(name, value)
        patch.setenv("MLFLOW_TRACKING_URI", address)
        script = block("python") + 'client.create_user("eve", "password of eve")'
        exec(script.replace("PASSWORD", "password of ada", 1).replace("PASSWORD", "password of bob"), {})
        yield server


@pytest.fixture
def client(server: Server):
    import mlflow

    return mlflow.MlflowClient(server.address)


MEMBER = """
import signal, sys, time
from pathlib import Path
from ddpm.tracking.run import start_run

signal.alarm(300)  # whatever becomes of the test
root, until = Path(sys.argv[1]), Path(sys.argv[2])
root.mkdir()
with start_run("sample", {}, root, root / ".resume" / "run") as run:
    run.tags({"marker": root.name})
    steps = 0
    while steps < 100 or not until.exists():
        run.metrics(steps, {"a": float(steps), "b": -float(steps)})
        if steps % 50 == 0:
            run.artifact(Path(sys.executable).with_name("mlflow"), str(steps))
        steps += 1
        time.sleep(0.05)
    while run.queue:
        time.sleep(0.05)
print(steps)
"""


@needs_postgres
def test_four_machines_lose_nothing_when_the_server_is_killed(server: Server, client, tmp_path: Path) -> None:
    """Each has a folder, and so a journal and locks, of its own."""
    address, back = {"MLFLOW_TRACKING_URI": server.address}, tmp_path / "back"
    team = [ADA, BOB, ADA, BOB]
    members = [python(MEMBER, tmp_path / f"machine-{n}", back, **address, **who) for n, who in enumerate(team)]

    def writing() -> set[str]:
        found = runs(client, "tags.marker LIKE 'machine-%'") if client.get_experiment_by_name("fashion-mnist-ddpm") else []
        return {r.data.tags["marker"] for r in found if r.data.metrics.get("a", 0) > 50}

    deadline = time.monotonic() + 120
    while len(writing()) < 4:
        assert time.monotonic() < deadline
        time.sleep(0.2)
    server.__exit__()
    time.sleep(3)
    server.__enter__()
    back.touch()

    for n, (member, who) in enumerate(zip(members, team, strict=True)):
        output, errors = member.communicate(timeout=120)
        assert member.returncode == 0, errors
        assert errors.startswith(f"warning: MLflow at {server.address}: ")  # by the kill, and not because another was quicker
        assert "exists" not in errors and "refused to log" not in errors
        steps = range(int(output.split()[-1]))
        (stored,) = runs(client, f"tags.marker = 'machine-{n}'")
        assert (stored.info.status, stored.data.tags["mlflow.user"]) == ("FINISHED", who["MLFLOW_TRACKING_USERNAME"])
        for name, sign in (("a", 1), ("b", -1)):
            values = [(m.step, m.value) for m in client.get_metric_history(stored.info.run_id, name)]
            assert sorted(values) == [(step, sign * step) for step in steps]
        for folder in artifacts(client, stored):
            file = client.download_artifacts(stored.info.run_id, f"{folder}/mlflow", tmp_path)
            assert Path(file).read_bytes() == Path(sys.executable).with_name("mlflow").read_bytes()
        assert artifacts(client, stored) == sorted(map(str, steps[::50]))
        assert stored.info.artifact_uri.startswith("mlflow-artifacts:")
        assert list((tmp_path / f"machine-{n}/.resume").iterdir()) == []


REFUSED = """
import sys
from pathlib import Path
from ddpm.tracking.run import start_run

root = Path(sys.argv[1])
root.mkdir()
with start_run("sample", {}, root, root / ".resume" / "run") as run:
    run.tags({"marker": "refused"})
    for step in range(100):
        run.metrics(step, {"a": float(step)})
"""


@needs_postgres
def test_a_refused_user_is_told_and_the_run_ships_later(server: Server, client, tmp_path: Path, monkeypatch):
    for path in ("/", "/api/2.0/mlflow/experiments/get?experiment_id=0", "/api/2.0/mlflow-artifacts/artifacts"):
        for credentials in (None, ("ada", "wrong"), ("nobody", "password of ada")):
            assert requests.get(server.address + path, auth=credentials, timeout=10).status_code == 401

    search = {"url": f"{server.address}/api/2.0/mlflow/experiments/search", "json": {"max_results": 1}, "timeout": 10}
    for host, origin, status in (
        ("mlflow.example.org", "https://mlflow.example.org", 200),  # the UI's page behind https asks so
        ("mlflow.example.org", "https://elsewhere.example.org", 403),
        ("elsewhere.example.org", "https://mlflow.example.org", 403),
    ):
        answer = requests.post(**search, headers={"Host": host, "Origin": origin}, auth=("ada", "password of ada"))
        assert answer.status_code == status

    address = {"MLFLOW_TRACKING_URI": server.address}
    unknown = "login failed; set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
    lacking = "the user in MLFLOW_TRACKING_USERNAME lacks the permission; ask the server's administrator for it"
    strangers = [
        ({}, unknown),
        (ADA | {"MLFLOW_TRACKING_PASSWORD": "wrong"}, unknown),
        ({"MLFLOW_TRACKING_USERNAME": "eve", "MLFLOW_TRACKING_PASSWORD": "password of eve"}, lacking),
    ]
    processes = [python(REFUSED, tmp_path / str(n), **address, **who) for n, (who, _) in enumerate(strangers)]
    for n, (process, (_, why)) in enumerate(zip(processes, strangers, strict=True)):
        _, errors = process.communicate(timeout=60)
        assert process.returncode == 0
        (kept,) = (tmp_path / f"{n}/.resume").glob("unshipped-*/")
        assert errors.splitlines() == [
            f"warning: MLflow at {server.address}: {why}; the run continues and sends everything once this is fixed",
            f"warning: MLflow at {server.address} has not received all of this run ({why}); "
            f"it is kept, and `python src/ship.py {kept}` sends it",
        ]
    assert runs(client, "tags.marker = 'refused'") == []

    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(UserError, match=f"^MLflow at {server.address}: {unknown}$"):
        ship(kept, ROOT)
    monkeypatch.undo()
    subprocess.run([sys.executable, "src/ship.py", kept], cwd=ROOT, env=ENVIRONMENT | address | BOB, check=True)
    (stored,) = runs(client, "tags.marker = 'refused'")
    assert stored.info.status == "FINISHED"
    assert sorted(m.step for m in client.get_metric_history(stored.info.run_id, "a")) == list(range(100))
    assert not kept.exists()


@needs_postgres
def test_make_ui_says_where_the_teams_runs_are(server: Server, client, monkeypatch) -> None:
    def ui(address: str, **user: str) -> subprocess.CompletedProcess:
        environment = ENVIRONMENT | {"MLFLOW_TRACKING_URI": address, "MLFLOW_EXPERIMENT_NAME": "of ada"} | user
        return subprocess.run(["python", "src/ui.py"], cwd=ROOT, env=environment, capture_output=True, text=True)

    for name, value in ADA.items():
        monkeypatch.setenv(name, value)
    page = (
        f"{server.address}/#/experiments/{client.create_experiment('of ada')}/runs?workflowType=machine_learning"
        f"&viewStateShareKey={view_key(FIRST_VIEW, 'FashionMNIST')}\n"
    )
    assert ui(server.address, **ADA).stdout == page

    stranger = ui(server.address)
    assert stranger.returncode == 1
    assert stranger.stderr.startswith(f"error: MLflow at {server.address}: login failed; set MLFLOW_")
    told = ui(server.address.replace("//", "//ada:password%20of%20ada@"))
    assert told.stdout == page  # without the password


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, Path]]:
    """The port of an SSH server, and a key that it lets in."""
    folder, port = tmp_path_factory.mktemp("ssh"), free_port()
    for key in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / key], check=True)
    (folder / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\n"
        f"HostKey {folder}/host\n"
        f"AuthorizedKeysFile {folder}/user.pub\n"
        "AuthenticationMethods publickey\n"
        "StrictModes no\n"  # the folder lies in one that everybody may write to
        "PidFile none\n"
        "Subsystem sftp internal-sftp\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # as Debian's service does: it locks itself in there
    process = subprocess.Popen([SSHD, "-D", "-f", folder / "config"])
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield port, folder / "user"
    process.terminate()
    process.wait()


@needs_sshd
def test_a_second_machine_pulls_the_outputs_and_reruns_nothing(smoke_run: Path, sshd: tuple[int, Path], tmp_path: Path):
    smoke_run, (port, key) = copied(smoke_run, tmp_path), sshd
    remote, other, model = tmp_path / "remote", tmp_path / "other", "models/diffusion_model.pth"

    def add_remote(clone: Path) -> None:
        run(clone, "dvc", "remote", "add", "--local", "-d", "team", f"ssh://127.0.0.1:{port}{remote}")
        run(clone, "dvc", "remote", "modify", "--local", "team", "keyfile", str(key))
        run(clone, "dvc", "remote", "modify", "--local", "team", "verify", "true")

    add_remote(smoke_run)
    run(smoke_run, "dvc", "push")
    assert run(smoke_run, "git", "status", "--porcelain") == ""

    run(tmp_path, "git", "clone", "--quiet", str(smoke_run), str(other))
    add_remote(other)
    (pushed,) = [path for path in remote.rglob("*") if path.is_file() and file_sha256(path) == file_sha256(smoke_run / model)]
    content = pushed.read_bytes()
    pushed.chmod(0o600)
    pushed.write_bytes(content[:1000] + bytes([content[1000] ^ 1]) + content[1001:])
    damaged = subprocess.run(["dvc", "pull"], cwd=other, env=ENVIRONMENT, capture_output=True, text=True)
    assert damaged.returncode != 0
    assert model in damaged.stderr
    assert not (other / model).exists()

    pushed.write_bytes(content)
    run(other, "dvc", "pull")
    assert crash.digests(other) == crash.digests(smoke_run)
    assert run(other, "dvc", "status").strip() == "Data and pipelines are up to date."
    assert stages_run(run(other, "dvc", "repro")) == []
    assert run(other, "git", "status", "--porcelain") == ""
    assert not (other / "mlflow.db").exists()
