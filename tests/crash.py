"""`python tests/crash.py [--kills 25] [--seed 0]`: the stages of the smoke preset, killed at random moments and started again.

In a clone of the repository, `dvc repro --force` of one stage after the other is stopped with all its processes, once or
several times in a row, by SIGKILL, SIGTERM or SIGINT; then the same command runs to its end. Every output and dvc.lock must
be byte for byte what they were, no temporary file may stay, and a training's MLflow run must have every step once, in order.
Training saves a state after every window of steps, so that the run after a kill has one to resume from.
"""

import argparse
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "src"), str(ROOT / "bench")]

from clones import edit_params, environment, plain_clone, timed  # noqa: E402
from ddpm.files import file_sha256  # noqa: E402
from measure import table  # noqa: E402

STAGES = ("download", "train", "sample", "evaluate")
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)  # SIGKILL twice as often
AGAIN = 0.3  # the probability that a run that was killed is killed again
FOLDERS = ("data", "models", "output")
FORCED = (str(Path(sys.executable).with_name("dvc")), "repro", "--force", "--single-item")


@dataclass
class Victim:
    """A stage of the pipeline in `folder`, the seconds it takes undisturbed, `dvc.lock`, and the digests of all outputs."""

    folder: Path
    stage: str
    seconds: float
    lock: bytes
    digests: dict[str, str]
    said: str = ""  # the output of all commands since the last one that ran to its end

    def strike(self, number: int, moment: float) -> bool:
        """Send the signal `number` `moment` seconds after the command's start. Returns whether the command still ran then."""
        process = start(self.folder, self.stage)
        time.sleep(moment)
        struck = process.poll() is None
        if struck:
            os.killpg(process.pid, number)
        self.said += process.communicate()[0]  # waits until the last process of the session has closed it
        return struck

    def faults(self) -> list[str]:
        """Run the command to its end. Returns a line for everything that is wrong afterwards."""
        process = start(self.folder, self.stage)
        output, _ = process.communicate()
        if process.returncode and "dvc.lock" in output:  # DVC writes it in place, so a kill may leave a part of it
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
    """Start the stage's command in a session of its own, so that a signal can reach all its processes."""
    return subprocess.Popen(
        [*FORCED, stage],
        cwd=folder,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def digests(folder: Path) -> dict[str, str]:
    """The digest of dvc.lock and of every file that the stages leave, including temporary files and those that git tracks."""
    files = [path for name in FOLDERS for path in (folder / name).rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): file_sha256(path) for path in [folder / "dvc.lock", *files]}


def training_faults(folder: Path) -> list[str]:
    """A line for every training in the MLflow store that isn't finished or doesn't have every step once, in order."""
    from mlflow import MlflowClient  # its import takes seconds

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
    """`plain_clone`, whose training saves a state after every window."""
    folder = plain_clone(folder)
    edit_params(folder, {"runtime": {"state_seconds": 0}})
    return folder


def victims(folder: Path) -> list[Victim]:
    """Every stage of the pipeline in `folder`, which has run once: each is forced to run again, undisturbed, and timed."""
    taken = {stage: timed(folder, *FORCED, stage) for stage in STAGES}
    lock, files = (folder / "dvc.lock").read_bytes(), digests(folder)
    return [Victim(folder, stage, seconds, lock, files) for stage, seconds in taken.items()]


def ordeals(targets: list[Victim], count: int, draw: random.Random) -> Iterator[tuple[str, int, list[str]]]:
    """Kill `count` runs, of one stage after the other. Yields what was done, how many signals struck, and the faults."""
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
    parser.add_argument("--kills", type=int, default=25, help="the number of runs to kill, each at least once (25)")
    parser.add_argument("--seed", type=int, default=0, help="the seed of the random moments (0)")
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
        sys.exit(f"{failed} runs ended differently from runs that nobody killed")


if __name__ == "__main__":
    main()
