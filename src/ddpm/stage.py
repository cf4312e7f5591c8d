"""How a stage does its work: in this process or in several that share it, in a folder that no other run has."""

import os
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import torch

from ddpm.errors import UserError
from ddpm.paths import project_root
from ddpm.runtime.distributed import Group, is_worker, joined, launch
from ddpm.runtime.run_folder import run_folder
from ddpm.tracking.run import mark_killed

FOLDER = "DDPM_RUN_FOLDER"  # tells the processes that a stage starts which folder it holds for them


def run_stage(work: Callable[[Group, Path], None], name: str, processes: int, device: torch.device) -> None:
    """Do `work` in .resume/`name`: in so many processes of this machine, or in those that the user's torchrun started.

    It is given the group of processes, of which only the first may write outputs and log, and the folder.
    """
    folder = project_root() / ".resume" / name
    if processes > 1 and not is_worker():
        if device.type == "mps" or device.index is not None:
            raise UserError(
                f"runtime.processes: {processes} processes can't share {device}; use runtime.device: cuda or cpu, or one"
            )
        with run_folder(folder) as held:
            os.environ[FOLDER] = str(held)
            try:
                launch(processes)
            except BaseException:
                mark_killed(held, project_root())  # its process may have been the one that was lost
                raise
        return
    with joined(device) as group, ExitStack() as stack:
        given = os.environ.get(FOLDER)
        if given is None and group.is_main:
            given = str(stack.enter_context(run_folder(folder)))
        work(group, folder.with_name(Path(group.broadcast(given)).name))  # on another machine the path may differ
