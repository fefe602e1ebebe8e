"""Named pipes through which other processes report events, so that tests need not look for them."""

import os
import select
from pathlib import Path

HANG_SECONDS = 900  # nothing happened for so long: the other process has hung


class Events:
    """A pipe at a path. Other processes write one character per event."""

    def __init__(self, path: Path):
        os.mkfifo(path)
        self._pipe = os.open(path, os.O_RDWR)  # a writer never has to wait for this reader

    def next(self) -> str:
        """Waits for the next event. Raises: AssertionError, if the other process has hung."""
        assert select.select([self._pipe], [], [], HANG_SECONDS)[0], "the other process has hung"
        return os.read(self._pipe, 1).decode()

    def close(self) -> None:
        os.close(self._pipe)
