"""What ends a program with one line instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend: shown as it is, without a traceback."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C asked the program to stop; no `except Exception` holds it up."""

    def __init__(self, number: int, message: str = "stopped; the same command goes on"):
        super().__init__(message)
        self.exit_status = 128 + number
