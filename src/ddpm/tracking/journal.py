"""The journal of a run: all that it logs, on disk before MLflow gets it.

`journal.jsonl` has one entry per line, and files wait in `outbox/` until they are sent. The first entry starts the run. An "end"
is the last one, unless the run was resumed after it. Times are milliseconds since 1970, a file is its path in the outbox:

    {"start": {"stage", "name", "params", "tags", "checkpoint_sha256", "system_metrics", "journal", "time"}}
    {"metric": name, "value", "step", "time"}          {"dataset": {"name", "digest", "source", "profile", "context"}}
    {"preview": file, "step", "time"}                  {"tags": {…}}
    {"artifact": file, "folder"}                       {"model": {"params": {…}, "tags": {…}}}
    {"register": file, "sampling": {…}}                {"best_evaluation": {metric: value, …}, "time"}
                                                       {"end": status, "time"}
"""

import errno
import json
import os
import uuid
from pathlib import Path
from typing import Any

from ddpm.files import sync, writing

Entry = dict[str, Any]


class Journal:
    """The journal of one MLflow run and its outbox, in a folder that may contain other files, too.

    Whatever follows the last complete line is dropped: an entry that was cut off while it was written, or what a power cut left.
    The constructor and the methods raise UserError if the disk is full or can't be written.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self.outbox = folder / "outbox"
        self.entries: list[Entry] = []  # of earlier processes
        self.size = 0  # bytes of complete lines
        with writing(self.path):
            self.outbox.mkdir(parents=True, exist_ok=True)
            content = self.path.read_bytes() if self.path.exists() else b""
            for line in content.split(b"\n")[:-1]:
                try:
                    self.entries.append(json.loads(line))
                except ValueError:
                    break
                self.size += len(line) + 1
            self.file = self.path.open("ab", buffering=0)
            self.file.truncate(self.size)

    @property
    def start(self) -> dict[str, Any] | None:
        """How an earlier process started the run; None if there was none."""
        return next((entry["start"] for entry in self.entries if "start" in entry), None)

    def append(self, entry: Entry) -> None:
        """Write the whole entry, or nothing."""
        line = json.dumps(entry).encode() + b"\n"
        with writing(self.path):
            if self.file.write(line) < len(line):  # the disk is full
                self.file.truncate(self.size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(line)

    def deposit(self, name: str, content: bytes) -> str:
        """Put a file into a new folder of the outbox, where it stays until it is sent; the file's path in the outbox."""
        folder = uuid.uuid4().hex[:8]
        hidden = self.outbox / f".{folder}"
        with writing(hidden):
            hidden.mkdir()
            (hidden / name).write_bytes(content)
            sync(hidden / name)
            sync(hidden)
            hidden.rename(self.outbox / folder)
        return f"{folder}/{name}"

    def sync(self) -> None:
        """Return when a power cut can no longer undo what was appended."""
        with writing(self.path):
            for path in (self.path, self.outbox, self.folder, self.folder.parent):
                sync(path)
