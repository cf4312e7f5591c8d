"""What every stage does around its work: processes, a folder that no other run uses, one MLflow run, and a last line."""

import os
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from ddpm.errors import UserError
from ddpm.params import Params
from ddpm.paths import RESUME, project_root
from ddpm.runtime.cli import duration
from ddpm.runtime.distributed import Group, is_worker, joined, launch
from ddpm.runtime.run_folder import remove_states, run_folder
from ddpm.tracking.run import Run, mark_killed, start_run

RUN_FOLDER = "DDPM_RUN_FOLDER"  # environment variable: the run folder that the launching process has locked for its ranks

Work = Callable[[Group, Path, Run | None], str]


def run_stage(
    stage: str,
    params: Params,
    device: torch.device,
    fingerprint: str,
    work: Work,
    checkpoint_sha256: str | None = None,
    trained_here: bool = True,
    next_steps: str = "",
) -> None:
    """Do the work of a stage, then print what it made (which `work` returns), how long it took, and what one might do next.

    `work` is called on each rank with the group of all ranks and the folder .resume/`fingerprint`. Only rank 0 gets the MLflow
    run, and only rank 0 may write outputs. With `checkpoint_sha256` the run is a child of the training that made this checkpoint.
    Unless the model was `trained_here`, the train section of `params` isn't logged: it was trained with other values.
    """
    folder, runtime = project_root() / RESUME / fingerprint, params.runtime
    if runtime.processes > 1 and not is_worker():
        launch_ranks(folder, runtime.processes, device)
        return
    with joined(device) as group, ExitStack() as stack:
        held = os.environ.get(RUN_FOLDER)
        if held is None and group.is_main:
            held = str(stack.enter_context(run_folder(folder)))
        folder = folder.with_name(Path(group.broadcast(held)).name)  # by its name: on another machine the path may differ
        if not group.is_main:
            work(group, folder, None)
            return
        logged = params.model_dump(exclude=None if trained_here else {"train"})
        where, required = str(device), runtime.require_mlflow
        with start_run(
            stage, logged, project_root(), folder, where, required, checkpoint_sha256, on_finished=lambda: remove_states(folder)
        ) as run:
            began = time.monotonic()
            made = work(group, folder, run)
            seconds = time.monotonic() - began
    print(f"{stage}: {made} ({duration(seconds)})", flush=True)
    if next_steps:
        print(next_steps, flush=True)


def launch_ranks(folder: Path, processes: int, device: torch.device) -> None:
    """Run this program as several processes of this machine, which share the work."""
    if device.type == "mps" or device.index is not None:
        remedy = "set runtime.device to cuda or cpu, or runtime.processes to 1"
        raise UserError(f"runtime.processes: {processes} processes can't share {device}; {remedy}")
    with run_folder(folder) as held:
        os.environ[RUN_FOLDER] = str(held)
        try:
            launch(processes)
        except BaseException:
            mark_killed(held, project_root())  # rank 0 may be the one that was lost
            raise
