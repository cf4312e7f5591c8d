"""Exceptions that end a program with one line instead of a traceback. `runtime.cli.clean_errors` prints that line."""


class UserError(Exception):
    """A mistake that the user can correct. The message says what is wrong and what would be right."""


class Stopped(BaseException):
    """SIGTERM or Ctrl-C asked the program to stop. It is no Exception, so that `except Exception` doesn't catch it."""

    def __init__(self, number: int, message: str = "Stopped. Run the same command again to resume."):
        super().__init__(message)
        self.exit_status = 128 + number  # of a signal's number
