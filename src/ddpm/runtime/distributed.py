"""Several processes that share one run's work by torch.distributed. `launch` starts them, or the user does it with `torchrun`."""

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

CONNECTION_ERRORS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe")  # in PyTorch's messages
LAUNCHER_VARIABLE = "DDPM_LAUNCHER"  # environment variable: `launch` puts its process id there
TIMEOUT = timedelta(days=7)  # ranks may wait long for one that is computing; a lost rank is noticed by its closed connection
RESUME = "Run the same command again to resume from the last saved state."


@dataclass(frozen=True)
class Group:
    """The processes that work together; this one is number `rank`. In a group of one the methods change nothing."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def shard(self, items: Any) -> Any:
        """This rank's part of a tensor or list that every rank has. Rank 0 gets at least one item, if there are any."""
        start, end = (-(-len(items) * r // self.world_size) for r in (self.rank, self.rank + 1))
        return items[start:end]

    def wrap(self, model: nn.Module) -> nn.Module:
        """The model, whose gradients `backward` averages over the ranks."""
        return nn.parallel.DistributedDataParallel(model) if self.world_size > 1 else model

    def all_reduce_mean(self, values: Tensor) -> Tensor:
        """`values`, averaged over the ranks in place."""
        if self.world_size > 1:
            dist.all_reduce(values)
            values /= self.world_size
        return values

    def gather(self, values: Tensor) -> Tensor | None:
        """The `values` of all ranks, concatenated in the order of their ranks, on the CPU. None on all ranks but rank 0."""
        if self.world_size == 1:
            return values.cpu()
        parts: list[Any] | None = [None] * self.world_size if self.is_main else None
        dist.gather_object(values.cpu(), parts, dst=0)
        return torch.cat(parts) if parts else None

    def broadcast(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank. Its tensors should be on the CPU."""
        if self.world_size > 1:
            values = [value]
            dist.broadcast_object_list(values, src=0)
            return values[0]
        return value


SINGLE_PROCESS = Group()


def is_worker() -> bool:
    """Whether `launch` or torchrun started this process."""
    return "WORLD_SIZE" in os.environ and "RANK" in os.environ


def is_lost_process_error(error: BaseException) -> bool:
    """Whether PyTorch raised this error because another process of the group was lost."""
    if not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(text in str(error) for text in CONNECTION_ERRORS)


@contextmanager
def joined(device: torch.device) -> Iterator[Group]:
    """The group of processes that this one was started in, which it leaves at the end of the block.

    Raises Stopped if another process of the group is lost. If the launcher is lost, this process is killed at once: it must no
    longer be working when the user starts the same run again.
    """
    if not is_worker():
        yield SINGLE_PROCESS
        return
    launcher = int(os.environ.get(LAUNCHER_VARIABLE, os.getppid()))
    threading.Thread(target=_end_with_launcher, args=[launcher], daemon=True).start()
    store, rank, size = next(dist.rendezvous("env://"))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # When torchrun restarts lost processes it keeps its store, which still has the addresses of the old ones.
        store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    try:
        yield Group(rank, size)
    except BaseException as error:
        if (raised := _error_to_raise(error, rank)) is error:
            raise
        raise raised from None
    finally:
        dist.destroy_process_group()


def _end_with_launcher(launcher: int) -> None:
    """Kill this process as soon as its parent isn't the process `launcher` any more."""
    while os.getppid() == launcher:
        time.sleep(0.2)
    os.kill(os.getpid(), signal.SIGKILL)


def _error_to_raise(error: BaseException, rank: int) -> BaseException:
    """What a rank ends with after `error`, so that only one rank prints a message: the one that failed first, else rank 0."""
    lost = is_lost_process_error(error)
    if lost or (rank and not isinstance(error, Stopped)):
        try:
            time.sleep(15)  # in that time the launcher notices the rank that ended, and stops this one
        except Stopped as stopped:
            error, lost = stopped, False
    if lost:
        error = Stopped(signal.SIGTERM, f"Another process of this run was lost{_reason(error)}. {RESUME}")
    return SystemExit(error.exit_status) if rank and isinstance(error, Stopped) else error


def _reason(error: BaseException) -> str:
    """NCCL's message: it may have lost the connection for another reason, such as two ranks on one GPU or no shared memory."""
    return f" or is unreachable ({str(error).splitlines()[0]})" if isinstance(error, dist.DistError) and str(error) else ""


def launch(count: int) -> None:
    """Run this program as `count` processes of this machine; returns when all of them have succeeded.

    Raises Stopped if they were asked to stop, UserError if one was killed, and SystemExit with the status of one that failed,
    which has printed why. In each case all of them have ended.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # the errors below say it in one line
    os.environ[LAUNCHER_VARIABLE] = str(os.getpid())
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // count)))
    config = LaunchConfig(1, 1, count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0", max_restarts=0)
    try:
        elastic_launch(config, sys.executable)(*sys.argv)
    except SignalException as error:
        raise Stopped(error.sigval, f"Stopped. {RESUME}") from None
    except ChildFailedError as error:
        stopped = (128 + signal.SIGTERM, 128 + signal.SIGINT, -signal.SIGTERM)  # when one fails, the launcher stops the others
        rank, failure = min(error.failures.items(), key=lambda item: (item[1].exitcode in stopped, item[1].timestamp))
        if failure.exitcode in stopped:
            raise Stopped(abs(failure.exitcode) % 128, f"Stopped. {RESUME}") from None
        if failure.exitcode > 0:
            sys.exit(failure.exitcode)
        if rank == 0:
            print(file=sys.stderr)  # ends the line of its progress bar
        killed = f"process {rank} of {count} was killed by {failure.signal_name()}, and the others were stopped"
        raise UserError(f"{killed}. {RESUME}") from None
