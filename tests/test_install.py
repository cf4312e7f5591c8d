"""The set-up: what it asks of the machine, where it takes packages from, and what it says before it begins."""

import functools
import http.server
import os
import shutil
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path

import install
import pytest

from clones import AS_SOMEBODY

ROOT = Path(__file__).resolve().parents[1]


def git(folder: Path, *command: str) -> None:
    subprocess.run(["git", *AS_SOMEBODY, *command], cwd=folder, check=True)


def test_a_folder_without_a_commit_is_refused(tmp_path):
    assert "clone the repository" in install.git_problem(tmp_path).lower()
    git(tmp_path, "init", "--quiet")
    assert "`git init && git add --all && git commit" in install.git_problem(tmp_path)
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "as downloaded")
    assert install.git_problem(tmp_path) is None


def test_an_unpacked_zip_inside_another_repository_is_refused(tmp_path):
    git(tmp_path, "init", "--quiet")
    git(tmp_path, "commit", "--quiet", "--allow-empty", "--message", "another project")
    (inside := tmp_path / "ddpm").mkdir()
    assert "git init" in install.git_problem(inside)


def test_without_git_one_line_says_so(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert install.git_problem(tmp_path) == "git is needed, and isn't installed"


@pytest.mark.parametrize(
    ("file", "variables", "expected"),
    [
        (
            "[global]\nindex-url = https://mirror.example.org/simple",
            {},
            {"UV_DEFAULT_INDEX": "https://mirror.example.org/simple"},
        ),
        (
            "[global]\nindex-url = https://weak.example.org\n[install]\nindex-url = https://strong.example.org",
            {},
            {"UV_DEFAULT_INDEX": "https://strong.example.org"},
        ),
        (
            "[global]\nindex-url = https://weak.example.org",
            {"PIP_INDEX_URL": "https://strong.example.org", "PIP_TRUSTED_HOST": "strong.example.org"},
            {"UV_DEFAULT_INDEX": "https://strong.example.org", "UV_INSECURE_HOST": "strong.example.org"},
        ),
        (
            "[global]\nextra-index-url =\n    https://one.example.org\n    https://two.example.org\nfind-links = /a /b",
            {},
            {
                "UV_INDEX": "https://one.example.org https://two.example.org",
                "UV_INDEX_STRATEGY": "unsafe-best-match",
                "UV_FIND_LINKS": "/a,/b",
            },
        ),
    ],
    ids=["a mirror", "the section install wins", "the environment wins", "several places"],
)
def test_what_pip_is_configured_with_is_handed_to_uv(tmp_path, file, variables, expected):
    (tmp_path / "pip.conf").write_text(file)
    clean = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    environment = {**clean, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), **variables}
    command = [sys.executable, "-m", "pip", "config", "list"]
    settings = install.pip_settings(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert {name: settings[name] for name in expected} == expected


def package(name: str, *files: dict) -> dict:
    return {"name": name, "version": "9.0", "wheels": list(files)}


def test_the_announcement_adds_up_what_will_be_downloaded():
    torch = package("torch", {"url": "https://x/a.whl", "size": 2_900_000_000}, {"url": "https://x/b.whl", "size": 3_000_000_000})
    source = {"name": "old", "version": "1", "sdist": {"url": "https://x/old.tar.gz", "size": 100_000_000}}
    assert install.download({"packages": [torch, source]}) == (
        "Installing 2 packages with PyTorch 9.0: 3.1 GB to download at most, about 4 min at 100 Mbit/s"
    )
    others = [package("near", {"url": "file:///x/near.whl"}), package("silent", {"url": "https://x/silent.whl"})]
    assert install.download({"packages": [torch, *others]}) == (
        "Installing 3 packages with PyTorch 9.0: 3.0 GB to download at most, about 4 min at 100 Mbit/s; "
        "1 of them from this machine's disk; the index doesn't tell the size of silent"
    )


def wheel(folder: Path, name: str) -> None:
    """A package of one empty module, in the folder of a simple index."""
    (folder / name).mkdir(parents=True)
    info = f"{name}-9.0.dist-info"
    with zipfile.ZipFile(folder / name / f"{name}-9.0-py3-none-any.whl", "w") as archive:
        archive.writestr(f"{name}.py", "")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 9.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def index(tmp_path) -> Iterator[tuple[str, list[str]]]:
    """The address of an index with `torch` and `tiny`, and the paths that were asked of it."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_) -> None:
            asked.append(self.path)

    for name in ("torch", "tiny"):
        wheel(tmp_path / "index", name)
    handler = functools.partial(Handler, directory=str(tmp_path / "index"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever).start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("uv") is None, reason="needs uv")
def test_packages_come_from_the_mirror_that_pip_is_configured_with(tmp_path, index):
    """PyTorch's own index lacks this version, whether it can be reached or not: the mirror's build is taken, with a line."""
    address, asked = index
    (folder := tmp_path / "clone").mkdir()
    shutil.copy(ROOT / "install.py", folder)
    (folder / "pyproject.toml").write_text('[project]\nname = "x"\nversion = "1"\ndependencies = ["tiny", "torch"]\n')
    (folder / "requirements.txt").write_text("tiny==9.0\ntorch==9.0\n")
    git(folder, "init", "--quiet")
    git(folder, "commit", "--quiet", "--allow-empty", "--message", "as cloned")
    subprocess.run([sys.executable, "-m", "venv", folder / ".venv"], check=True)
    (folder / ".venv/bin/uv").symlink_to(shutil.which("uv"))  # which install.py would take from the mirror too
    (tmp_path / "pip.conf").write_text(f"[global]\nindex-url = {address}\n")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    environment = {**clean, "PIP_CONFIG_FILE": str(tmp_path / "pip.conf"), "UV_CACHE_DIR": str(tmp_path / "cache")}
    done = subprocess.run(
        [sys.executable, "install.py"], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    unreachable, announced = done.stdout.splitlines()
    assert unreachable.startswith("PyTorch's own package index can't be used (")
    assert unreachable.endswith("); installing the build of your package index")
    assert announced.startswith("Installing 2 packages with PyTorch 9.0: ")
    assert announced.endswith("the index doesn't tell the size of tiny, torch")
    for name in ("tiny", "torch"):
        assert f"/{name}/{name}-9.0-py3-none-any.whl" in asked
        subprocess.run([folder / ".venv/bin/python", "-c", f"import {name}"], check=True)
