"""`python bench/crash.py [--kills 25] [--seed 0]`: the stages of the smoke preset, killed at random moments and started again.

In a clone of the repository, `dvc repro --force` of one stage after the other is stopped with all its processes, once or
several times in a row, by SIGKILL, SIGTERM or SIGINT; then the same command runs to its end. Every output and dvc.lock must
be byte for byte what they were, no temporary file may stay, and a training's MLflow run must have every step once, in order.
Training keeps a state after every window of steps, so that a kill finds one to go on from.
"""

import argparse
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

from contenders import ROOT
from ddpm.files import file_sha256
from ddpm.params_file import merge
from measure import own_environment, table

STAGES = ("download", "train", "sample", "evaluate")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # the merciless one twice as often
AGAIN = 0.3  # how probably a run that was killed is killed again
FOLDERS = ("data", "models", "output")
FORCED = ("dvc", "repro", "--force", "--single-item")


@dataclass
class Victim:
    """A stage of the pipeline in `folder`, how long it takes undisturbed, `dvc.lock`, and the files that it must leave."""

    folder: Path
    stage: str
    seconds: float
    lock: bytes
    digests: dict[str, str]
    said: str = ""  # by the commands since the last that ran to its end

    def strike(self, number: int, moment: float) -> bool:
        """Stop the command `moment` seconds after its start; whether it still ran then."""
        process = start(self.folder, self.stage)
        time.sleep(moment)
        struck = process.poll() is None
        if struck:
            os.killpg(process.pid, number)
        self.said += process.communicate()[0]  # till the last process of the session has closed its end
        return struck

    def faults(self) -> list[str]:
        """What is wrong after the command has run to its end."""
        process = start(self.folder, self.stage)
        output, _ = process.communicate()
        if process.returncode and "dvc.lock" in output:  # DVC writes it in place: a part of it was left
            (self.folder / "dvc.lock").write_bytes(self.lock)
            process = start(self.folder, self.stage)
            output, _ = process.communicate()
        said, self.said = self.said + output, ""
        if process.returncode:
            return [f"exit status {process.returncode}: {output[-1000:]}"]
        now = digests(self.folder)
        names = sorted(name for name in self.digests.keys() | now.keys() if self.digests.get(name) != now.get(name))
        faults = [f"differs: {name}" for name in names] + (training_faults(self.folder) if self.stage == "train" else [])
        faults += [f"left behind: {path}" for path in (self.folder / ".resume").iterdir() if path.is_dir()]
        return [*faults, f"the commands said: {said[-2000:]}"] if faults else []


def start(folder: Path, stage: str) -> subprocess.Popen:
    """The stage's command, in a session of its own."""
    return subprocess.Popen(
        [*FORCED, stage],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def timed(folder: Path, *command: str) -> float:
    """Seconds that the command takes in `folder`. Raises SystemExit with what it said where it fails."""
    began = time.perf_counter()
    done = subprocess.run(
        command, cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: {done.stdout[-1000:]}")
    return time.perf_counter() - began


def environment() -> dict[str, str]:
    """`own_environment`, with this Python first on the path."""
    clean = own_environment()
    return {**clean, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{clean['PATH']}"}


def digests(folder: Path) -> dict[str, str]:
    """Of every file that the stages leave, temporary ones and those that git tracks included, and of dvc.lock."""
    files = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): file_sha256(path) for path in [folder / "dvc.lock", *files]}


def training_faults(folder: Path) -> list[str]:
    """What is wrong with the trainings in the MLflow store; one that was killed is to be there once, and finished."""
    from mlflow import MlflowClient  # the other parts of the bench do without, where a GPU is lent

    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fashion-mnist-ddpm")
    expected = list(range(1, yaml.safe_load((folder / "params.yaml").read_text())["train"]["steps"] + 1))
    faults = []
    for run in client.search_runs([experiment.experiment_id], "tags.stage = 'train'"):
        history = client.get_metric_history(run.info.run_id, "train/loss")
        steps = [m.step for m in sorted(history, key=lambda m: (m.timestamp, m.step))]
        if run.info.status != "FINISHED" or steps != expected:
            faults.append(f"MLflow has a training that is {run.info.status}, of the steps {steps}")
    return faults


def clone(folder: Path) -> Path:
    """`plain_clone`, whose training keeps a state every window."""
    folder = plain_clone(folder)
    source = folder / "src/ddpm/training.py"
    source.write_text(re.sub(r"(?m)^STATE_SECONDS = .*$", "STATE_SECONDS = 0", source.read_text()))
    return folder


def plain_clone(folder: Path) -> Path:
    """A clone of the repository in `folder`, as the working tree is, with the smoke preset applied."""
    folder = folder / "clone"
    subprocess.run(["git", "clone", "--quiet", ROOT, folder], check=True)
    listing = ["git", "ls-files", "-z", "--modified", "--others", "--exclude-standard"]
    for name in subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\0"):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, folder / name)
    subprocess.run([sys.executable, "src/preset.py", "smoke"], cwd=folder, stdout=subprocess.DEVNULL, check=True)
    return folder


def edit_params(clone: Path, changes: dict) -> None:
    path = clone / "params.yaml"
    params = yaml.safe_load(path.read_text())
    list(merge(params, changes))  # in place; it yields what it changed
    path.write_text(yaml.safe_dump(params))


def victims(folder: Path) -> list[Victim]:
    """Every stage of the pipeline in `folder`, which has run once, after a run that nobody disturbs."""
    taken = {stage: timed(folder, *FORCED, stage) for stage in STAGES}
    lock, files = (folder / "dvc.lock").read_bytes(), digests(folder)
    return [Victim(folder, stage, seconds, lock, files) for stage, seconds in taken.items()]


def ordeals(targets: list[Victim], count: int, draw: random.Random) -> Iterator[tuple[str, int, list[str]]]:
    """Kill the stages' runs in turn, `count` runs in all; for each what was done, how many signals struck, and the faults."""
    for n in range(count):
        victim, said, kills = targets[n % len(targets)], [], 0
        while not said or draw.random() < AGAIN:
            number, moment = draw.choice(SIGNALS), draw.uniform(0, victim.seconds)
            struck = victim.strike(number, moment)
            kills += struck
            said.append(f"{signal.Signals(number).name} after {moment:.1f} s" + ("" if struck else " (too late)"))
        yield f"{victim.stage}: {', '.join(said)}", kills, victim.faults()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="how many runs to kill, once or more often (25)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    options = parser.parse_args()
    struck, failed = dict.fromkeys(STAGES, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        smoke = clone(Path(folder))
        subprocess.run(["dvc", "repro", "--quiet"], cwd=smoke, env=environment(), check=True)
        for said, kills, faults in ordeals(victims(smoke), options.kills, random.Random(options.seed)):
            struck[said.partition(":")[0]] += kills
            failed += bool(faults)
            print(f"{said}: {'; '.join(faults) or 'the same bytes'}", flush=True)
    print(table(["stage", "kills"], [[stage, count] for stage, count in struck.items()]))
    if failed:
        sys.exit(f"{failed} runs ended otherwise than if they had never been killed")


if __name__ == "__main__":
    main()
