"""What a run reports, on disk before anybody else has it: a line an entry, and the files that are still to be shipped."""

import errno
import json
import os
import uuid
from pathlib import Path

from ddpm.files import sync, writing


class Journal:
    """The lines of one MLflow run, in a folder that may hold more, and its outbox.

    What follows the last whole line is dropped: an entry that was torn off while it was written, or whatever a power cut left.
    Raises UserError, here and in its methods, where the disk is full or can't be written.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "journal.jsonl"
        self.outbox = folder / "outbox"
        self.entries: list[dict] = []  # those of earlier processes
        self.size = 0
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

    def append(self, entry: dict) -> None:
        """Write the entry, or nothing of it."""
        line = json.dumps(entry).encode() + b"\n"
        with writing(self.path):
            if self.file.write(line) < len(line):  # the disk is full
                self.file.truncate(self.size)
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.size += len(line)

    def deposit(self, name: str, content: bytes) -> str:
        """Put a file into a new folder of the outbox, which it leaves when it has been shipped; its path from there."""
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
        """Return when a power cut can't undo what was appended."""
        with writing(self.path):
            for path in (self.path, self.outbox, self.folder, self.folder.parent):
                sync(path)
