"""`python3 install.py [--dev]`: make `.venv` with the pinned packages; the Makefile runs it before everything else.

uv installs in half a minute what takes pip several. PyTorch's build is the one that this machine can use: some hundred megabytes
without an NVIDIA driver, some gigabytes with one; UV_TORCH_BACKEND (cpu, cu130 …) chooses another. The versions are those of
requirements.txt in any case. With --dev also come the packages that tests, style checks and the bench need.
"""

from __future__ import annotations  # older Pythons read this file too, to be told that they are too old

import argparse
import ast
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin/python"
LOCK = VENV / "pylock.toml"
UV_VARIABLES = {  # by the name of pip's setting
    "index-url": "UV_DEFAULT_INDEX",
    "extra-index-url": "UV_INDEX",
    "find-links": "UV_FIND_LINKS",
    "trusted-host": "UV_INSECURE_HOST",
    "cert": "SSL_CERT_FILE",
    "proxy": "ALL_PROXY",
}
UNREACHABLE = {"UV_HTTP_TIMEOUT": "10", "UV_HTTP_RETRIES": "0"}  # to look for an index that may be unreachable
MEGABIT = 1e6 / 8


def git_problem(root: Path) -> str | None:
    """Why DVC can't work in the folder `root`, which has to be a git repository with a commit."""
    try:
        git = subprocess.run(["git", "rev-parse", "--show-toplevel", "HEAD"], cwd=root, capture_output=True, text=True)
    except FileNotFoundError:
        return "git is needed, and isn't installed"
    if "dubious ownership" in git.stderr:
        return git.stderr.strip()  # which names the command that helps
    if git.returncode or Path(git.stdout.splitlines()[0]).resolve() != root.resolve():
        return (
            "DVC needs a git repository with a commit here. Clone the repository instead of downloading a ZIP, "
            "or run `git init && git add --all && git commit --message 'as downloaded'`"
        )
    return None


def pip_settings(listing: str) -> dict[str, str]:
    """uv's variables for what pip is configured with, from the output of `pip config list`: uv doesn't read it itself."""
    found = {}
    for section in ("global.", "install.", ":env:."):  # from the weakest to the strongest
        for line in listing.splitlines():
            name, _, value = line.partition("=")
            if name.startswith(section) and name[len(section) :] in UV_VARIABLES:
                found[UV_VARIABLES[name[len(section) :]]] = " ".join(ast.literal_eval(value).split())
    if "UV_FIND_LINKS" in found:
        found["UV_FIND_LINKS"] = found["UV_FIND_LINKS"].replace(" ", ",")
    if "UV_INDEX" in found:
        found["UV_INDEX_STRATEGY"] = "unsafe-best-match"  # as pip does: the best version of all indexes
    return found


def download(lock: dict) -> str:
    """What installing a pylock.toml downloads: the number of packages, their size and how long that takes."""
    sizes, unknown, local = [], [], 0
    for package in lock["packages"]:
        files = package.get("wheels") or [package.get("sdist", {})]
        known = [file["size"] for file in files if "size" in file]
        if any(file.get("url", "").startswith("file:") or "path" in file for file in files):
            local += 1
        elif known:
            sizes.append(max(known))
        else:
            unknown.append(package["name"])
    total = sum(sizes)
    (torch,) = [package["version"] for package in lock["packages"] if package["name"] == "torch"]
    minutes = total / (100 * MEGABIT) / 60
    text = f"Installing {len(lock['packages'])} packages with PyTorch {torch}: {total / 1e9:.1f} GB to download at most"
    text += f", about {max(1, round(minutes))} min at 100 Mbit/s"
    if local:
        text += f"; {local} of them from this machine's disk"
    if unknown:
        text += f"; the index doesn't tell the size of {', '.join(unknown)}"
    return text


def resolve(backend: str | None, environment: dict[str, str]) -> None:
    """Write LOCK: the pinned versions, with PyTorch's build for `backend`, or for this machine where its index can be reached."""
    compiled = ["compile", "--quiet", "pyproject.toml", "-c", "requirements.txt", "--format", "pylock.toml", "-o", LOCK]
    if backend:
        run_uv(*compiled, "--torch-backend", backend, environment=environment)
        return
    tried = uv(*compiled, "--torch-backend", "auto", environment={**environment, **UNREACHABLE}, stderr=subprocess.PIPE)
    if tried.returncode:
        reason = (tried.stderr.strip().splitlines() or ["no reason given"])[-1].strip()
        print(f"PyTorch's own package index can't be used ({reason}); installing the build of your package index", flush=True)
        run_uv(*compiled, environment=environment)


def run_uv(command: str, *arguments: object, environment: dict[str, str]) -> None:
    """Run `uv pip <command>`. Ends the program if it fails; uv has said why."""
    if status := uv(command, *arguments, environment=environment).returncode:
        sys.exit(status)


def uv(command: str, *arguments: object, environment: dict[str, str], stderr: int | None = None) -> subprocess.CompletedProcess:
    """Run `uv pip <command>` for the virtual environment."""
    words = [VENV / "bin/uv", "pip", command, "--python", PYTHON, *arguments]
    return subprocess.run(words, cwd=ROOT, env=environment, stderr=stderr, text=True, check=False)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--dev", action="store_true", help="also install what tests, style checks and the bench need")
    dev = parser.parse_args().dev
    if sys.version_info < (3, 11):  # noqa: UP036 -- the Makefile starts it with any Python
        sys.exit("error: Python 3.11 or newer is needed; this is " + sys.version.split()[0])
    if problem := git_problem(ROOT):
        sys.exit("error: " + problem)
    if not (VENV / "bin/uv").exists():
        print("Making .venv", flush=True)
        subprocess.run([sys.executable, "-m", "venv", VENV], check=True)
        subprocess.run([PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "uv"], check=True)
    settings = subprocess.run([PYTHON, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    # Compiled once, at installation: where Python may not keep what it compiles, every start would take seconds longer.
    environment = {**pip_settings(settings), "UV_COMPILE_BYTECODE": "1", **os.environ}
    backend = environment.pop("UV_TORCH_BACKEND", None)  # not for the installation, when PyTorch's build is decided
    if dev:
        wanted = ["-r", "requirements-dev.txt", "-r", "bench/requirements.txt", "-c", "requirements.txt"]
    else:
        resolve(backend, environment)
        import tomllib  # new in Python 3.11

        print(download(tomllib.loads(LOCK.read_text())), flush=True)
        wanted = ["--preview-features", "pylock", "-r", LOCK]  # for uv, such files are still new
    run_uv("install", *wanted, environment=environment)


if __name__ == "__main__":
    try:
        main()
    except subprocess.CalledProcessError as error:  # whose command has told why
        sys.exit(error.returncode)
