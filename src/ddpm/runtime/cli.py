"""What every command does around its work: arguments, signals, and mistakes told in one line."""

import argparse
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

from ddpm.errors import Stopped, UserError


def between(low: int, high: int) -> Callable[[str], int]:
    """For argparse: what reads a whole number in this range, or refuses with a line that says so."""

    def read(text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise argparse.ArgumentTypeError(f"{text} should be a whole number from {low} to {high}")
        return int(text)

    return read


@contextmanager
def clean_errors() -> Iterator[None]:
    """End the program with one line where the user's mistake (exit status 1) or a signal (143, 130) is the cause.

    A signal waits until imports are done, which would else keep a lock that other threads then wait for, or tell an importer
    that can do without that there is no such library. Where it strikes in a callback of the garbage collector, which lets no
    exception out, it strikes again.
    """

    def again(number: int) -> None:
        signal.signal(signal.SIGALRM, lambda *_: signal.raise_signal(number))
        signal.setitimer(signal.ITIMER_REAL, 0.05)

    def stop(number: int, frame: FrameType | None) -> None:
        if any(f.f_code.co_filename.startswith("<frozen importlib") for f, _ in traceback.walk_stack(frame)):
            again(number)
        else:
            raise Stopped(number)

    def lost(ignored: "sys.UnraisableHookArgs") -> None:
        if isinstance(ignored.exc_value, Stopped):
            again(ignored.exc_value.exit_status - 128)
        else:
            before(ignored)

    before, sys.unraisablehook = sys.unraisablehook, lost
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        yield
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        print(stopped, file=sys.stderr)
        sys.exit(stopped.exit_status)


@contextmanager
def stop_signals() -> Iterator[list[int]]:
    """A list that SIGTERM and Ctrl-C append to, so that the loop stops between two steps; a second Ctrl-C stops it at once."""
    received: list[int] = []

    def handle(number: int, _frame: object) -> None:
        if received and number == signal.SIGINT:
            raise Stopped(number)
        received.append(number)

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
