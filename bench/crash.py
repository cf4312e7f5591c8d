"""`python bench/crash.py [--kills 25] [--seed 0]`: the stages of the smoke preset, killed at random moments and started again.

In a clone of the repository, `dvc repro --force` of one stage after the other is stopped with all its processes, once or
several times in a row, by SIGKILL, SIGTERM or SIGINT; then the same command runs to its end. Every output and dvc.lock must
be byte for byte what they were, no temporary file may stay, and a training's MLflow run must have every step once, in order.
The training keeps a state after every window of steps, so that a kill finds one to go on from.
"""

import argparse
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import yaml
from mlflow import MlflowClient

from contenders import ROOT
from ddpm.files import file_sha256
from measure import table

STAGES = ("download", "train", "sample", "evaluate")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # the merciless one twice as often
AGAIN = 0.3  # how probably a run that was killed is killed again
FOLDERS = ("data", "models", "output")


@dataclass
class Victim:
    """A stage of the pipeline in `folder`, how long its command takes undisturbed, and the files that it must leave."""

    folder: Path
    stage: str
    seconds: float
    digests: dict[str, str]

    def strike(self, number: int, moment: float) -> bool:
        """Stop the command `moment` seconds after its start; whether it still ran then."""
        process = start(self.folder, self.stage)
        time.sleep(moment)
        struck = process.poll() is None
        if struck:
            os.killpg(process.pid, number)
        process.communicate()  # till the last process of the session has closed its end
        return struck

    def faults(self) -> list[str]:
        """What is wrong after the command has run to its end."""
        process = start(self.folder, self.stage)
        output, _ = process.communicate()
        if process.returncode:
            return [f"exit status {process.returncode}: {output[-1000:]}"]
        now = digests(self.folder)
        names = sorted(name for name in self.digests.keys() | now.keys() if self.digests.get(name) != now.get(name))
        return [f"differs: {name}" for name in names] + (training_faults(self.folder) if self.stage == "train" else [])


def start(folder: Path, stage: str) -> subprocess.Popen:
    """The stage's command, in a session of its own."""
    command = ["dvc", "repro", "--force", "--single-item", stage]
    return subprocess.Popen(
        command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )


def digests(folder: Path) -> dict[str, str]:
    """Of every file that the stages leave, temporary ones and those that git tracks included, and of dvc.lock."""
    files = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): file_sha256(path) for path in [folder / "dvc.lock", *files]}


def training_faults(folder: Path) -> list[str]:
    """What is wrong with the newest training in the MLflow store."""
    client = MlflowClient(f"sqlite:///{folder / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("fashion-mnist-ddpm")
    run, *_ = client.search_runs([experiment.experiment_id], "tags.stage = 'train'", order_by=["attributes.start_time DESC"])
    history = client.get_metric_history(run.info.run_id, "train/loss")
    steps = [m.step for m in sorted(history, key=lambda m: (m.timestamp, m.step))]
    expected = list(range(1, yaml.safe_load((folder / "params.yaml").read_text())["train"]["steps"] + 1))
    faults = [] if run.info.status == "FINISHED" else [f"MLflow says {run.info.status}"]
    faults += [] if steps == expected else [f"MLflow has the steps {steps}"]
    return faults + [f"left behind: {path}" for path in (folder / ".resume").rglob("*.pt")]


def prepared(folder: Path) -> Path:
    """A clone of the repository in `folder` that has run the smoke preset."""
    clone = folder / "clone"
    for command, where in (
        (["git", "clone", "--quiet", str(ROOT), str(clone)], folder),
        ([sys.executable, "src/preset.py", "smoke"], clone),
    ):
        subprocess.run(command, cwd=where, check=True)
    source = clone / "src/ddpm/training.py"
    source.write_text(re.sub(r"(?m)^STATE_SECONDS = .*$", "STATE_SECONDS = 0", source.read_text()))
    subprocess.run(["dvc", "repro", "--quiet"], cwd=clone, check=True)
    return clone


def victims(clone: Path) -> list[Victim]:
    """Every stage, after a run that nobody disturbs."""
    taken = {}
    for stage in STAGES:
        began = time.monotonic()
        process = start(clone, stage)
        output, _ = process.communicate()
        if process.returncode:
            sys.exit(f"{stage} fails without being killed: {output[-1000:]}")
        taken[stage] = time.monotonic() - began
    files = digests(clone)
    return [Victim(clone, stage, seconds, files) for stage, seconds in taken.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--kills", type=int, default=25, help="how many runs to kill, once or more often (25)")
    parser.add_argument("--seed", type=int, default=0, help="of the random moments (0)")
    options = parser.parse_args()
    draw, kills, failed = random.Random(options.seed), dict.fromkeys(STAGES, 0), 0
    with tempfile.TemporaryDirectory() as folder:
        targets = victims(prepared(Path(folder)))
        for n in range(options.kills):
            victim = targets[n % len(targets)]
            said = []
            while not said or draw.random() < AGAIN:
                number, moment = draw.choice(SIGNALS), draw.uniform(0, victim.seconds)
                struck = victim.strike(number, moment)
                kills[victim.stage] += struck
                said.append(f"{signal.Signals(number).name} after {moment:.1f} s" + ("" if struck else " (too late)"))
            faults = victim.faults()
            failed += bool(faults)
            print(f"{victim.stage}: {', '.join(said)}: {'; '.join(faults) or 'the same bytes'}", flush=True)
    print(table(["stage", "kills"], [[stage, count] for stage, count in kills.items()]))
    if failed:
        sys.exit(f"{failed} runs ended otherwise than if they had never been killed")


if __name__ == "__main__":
    main()
