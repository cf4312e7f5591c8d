"""What every command does around its work: number arguments, durations, one-line errors, and stopping on signals."""

import argparse
import atexit
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import FrameType
from typing import NoReturn

from ddpm.errors import Stopped, UserError

SIGNALS = (signal.SIGTERM, signal.SIGINT)
POSTPONED_SECONDS = 0.05


def between(low: int, high: int) -> Callable[[str], int]:
    """A `type` for argparse: whole numbers in this range. Others are refused with a line that says so."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} should be a whole number from {low} to {high}")
        return int(text)

    return read


def duration(seconds: float) -> str:
    """For people: 7.4 s, or 12 min 5 s."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


@contextmanager
def clean_errors() -> Iterator[None]:
    """End the program after the block, with one line on a mistake of the user (exit status 1), SIGTERM (143) or Ctrl-C (130).

    A signal ends the program at once; during an import or a garbage-collector callback, a moment later.
    """
    status = 0
    if sys.stdout:
        sys.stdout.reconfigure(errors="replace")  # type: ignore[union-attr]  # the terminal may know ASCII only
    sys.unraisablehook = partial(_repeat_lost_signal, sys.unraisablehook)
    for number in SIGNALS:
        signal.signal(number, _stop)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        status = 1
    except Stopped as stopped:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
        print(stopped, file=sys.stderr)
        status = stopped.exit_status
    _exit(status)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C are appended to, so that a loop can stop between steps. A second Ctrl-C raises Stopped."""
    received: list[int] = []

    def handle(number: int, frame: FrameType | None) -> None:
        if received and number == signal.SIGINT:
            _stop(number, frame)
        else:
            received.append(number)

    before = {number: signal.signal(number, handle) for number in SIGNALS}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _exit(status: int) -> NoReturn:
    """Exit as the interpreter does, but without taking the imported modules down, which takes it two seconds with PyTorch."""
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads
    atexit._run_exitfuncs()
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except OSError:  # nobody reads it any more, or the disk is full
            status = status or 1
    os._exit(status)


def _stop(number: int, frame: FrameType | None) -> None:
    """Raise Stopped, but let an import complete first.

    An import that is cut short would keep a lock that other threads wait for, or code with an optional import would think that
    the library isn't installed.
    """
    if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in traceback.walk_stack(frame)):
        _postpone(number)
    else:
        raise Stopped(number)


def _repeat_lost_signal(hook: Callable, lost: "sys.UnraisableHookArgs") -> None:
    """Send a signal again if its Stopped was raised in a callback of the garbage collector, which no exception can leave."""
    if isinstance(lost.exc_value, Stopped):
        _postpone(lost.exc_value.exit_status - 128)
    else:
        hook(lost)


def _postpone(number: int) -> None:
    """Send this process the signal a moment later."""
    signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
    signal.setitimer(signal.ITIMER_REAL, POSTPONED_SECONDS)
