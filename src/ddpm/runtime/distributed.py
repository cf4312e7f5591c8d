"""Several processes that work as one, under `torch.distributed.run`: started by a stage, or by the user's own `torchrun`."""

import logging
import os
import signal
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ddpm.errors import Stopped, UserError

LOST = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in what PyTorch raises
LAUNCHER = "DDPM_LAUNCHER"  # tells the processes that `launch` starts which one they end with
PATIENCE = timedelta(days=7)  # one may draw or compute for long while the others wait; lost ones are noticed by their connection
AGAIN = "the same command goes on from the last saved state"


@dataclass(frozen=True)
class Group:
    """The processes of which this is number `rank`. A group of one does nothing."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Any) -> Any:
        """This process's slice of a tensor or list that all of them have; the first has one where there is anything."""
        start, end = (-(-len(items) * r // self.world_size) for r in (self.rank, self.rank + 1))
        return items[start:end]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model with gradients that are averaged over the processes."""
        return nn.parallel.DistributedDataParallel(model) if self.world_size > 1 else model

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """`values` averaged over the processes, in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, values: Tensor) -> Tensor | None:
        """What all processes have, one after the other, on the CPU; None in all but the first."""
        if self.world_size == 1:
            return values.cpu()
        boxes = [None] * self.world_size if self.is_main else None
        dist.gather_object(values.cpu(), boxes, dst=0)
        return torch.cat(boxes) if self.is_main else None

    def broadcast(self, value: Any) -> Any:
        """What the first process has, on the CPU."""
        if self.world_size > 1:
            box = [value]
            dist.broadcast_object_list(box, src=0)
            return box[0]
        return value


SINGLE_PROCESS = Group()


def is_worker() -> bool:
    """Whether a launcher started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_lost_process_error(error: BaseException) -> bool:
    """Whether it is what PyTorch raises where another process of the same group is gone."""
    return isinstance(error, RuntimeError) and (isinstance(error, dist.DistError) or any(sign in str(error) for sign in LOST))


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group that this process was started in, for as long as the block lasts.

    Raises Stopped where another of its processes is lost. Where the launcher is, this process ends at once: whoever starts
    the same run again must not find it at work.
    """
    if not is_worker():
        yield SINGLE_PROCESS
        return
    threading.Thread(target=_end_with, args=[int(os.environ.get(LAUNCHER, os.getppid()))], daemon=True).start()
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # torchrun keeps its store when it restarts what was lost, and with it the addresses of processes that are gone
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=PATIENCE
    )
    try:
        yield Group(rank, size)
    except BaseException as error:
        if (ending := _ending(error, rank)) is error:
            raise
        raise ending from None
    finally:
        dist.destroy_process_group()


def _end_with(launcher: int) -> None:
    while os.getppid() == launcher:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _ending(error: BaseException, rank: int) -> BaseException:
    """What this process ends with, so that of several only the one speaks where it began, or else the first."""
    lost = is_lost_process_error(error)
    if lost or (rank and not isinstance(error, Stopped)):
        try:
            time.sleep(15)  # the launcher sees the other one's end meanwhile, and ends this one
        except Stopped as stopped:
            error, lost = stopped, False
    if lost:
        error = Stopped(signal.SIGTERM, f"another process of this run was lost{_reason(error)}; {AGAIN}")
    return SystemExit(error.exit_status) if rank and isinstance(error, Stopped) else error


def _reason(error: BaseException) -> str:
    """What nccl says, which has other reasons as well: two processes on one GPU, too little shared memory."""
    return f", or can't be reached ({str(error).splitlines()[0]})" if isinstance(error, dist.DistError) and str(error) else ""


def launch(count: int) -> None:
    """Run this program again as `count` processes on this machine, and return when all have succeeded.

    Raises Stopped where they were asked to stop, UserError where one was killed, SystemExit with the status of one that failed
    and said why; by then none is left.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it has to say is said below, in a line
    os.environ[LAUNCHER] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(1, 1, count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as error:
        raise Stopped(error.sigval, f"stopped; {AGAIN}") from None
    except ChildFailedError as error:
        stopped = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)  # as all are where one has failed
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode in stopped, item[1].timestamp))
        if failure.exitcode in stopped:
            raise Stopped(abs(failure.exitcode) % 128, f"stopped; {AGAIN}") from None
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        if rank == 0:
            print(file=sys.stderr)  # its progress bar has not ended its line
        killed = f"process {rank} of {count} was killed by {failure.signal_name()}, and all were ended"
        raise UserError(f"{killed}; {AGAIN}") from None
