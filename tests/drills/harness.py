"""Forked processes that stop at every event, and functions that must end with a sentence."""

import os
import random
import re
import runpy
import signal
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.events import HANG_SECONDS

MEMORY = 12 * 2**30  # bytes of address space, much of which PyTorch reserves but never uses


class Lost(Exception):
    """An attempt that the project did not survive; the message says what happened."""


@dataclass(frozen=True)
class Attempt:
    """What a drill needs for one attempt."""

    random: random.Random
    folder: Path  # empty


@dataclass(frozen=True)
class Ended:
    """How a process ended."""

    status: int  # exit status; negative: the signal that killed it
    output: str

    def expect(self, *statuses: int) -> None:
        """Raises: Lost, for another status or a traceback."""
        if "Traceback" in self.output or self.status not in statuses:
            raise Lost(f"exit status {self.status}: {self.output.strip()[-1500:]}")


class Process:
    """A forked process that runs a function and waits at every event until it may continue."""

    def __init__(self, function: Callable[[], object], log: Path):
        self._log = log
        reports, self._write_report = os.pipe()
        self._read_go, go = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            os.close(reports)
            os.close(go)
            self._run(function)
        os.close(self._write_report)
        os.close(self._read_go)
        self._reports, self._go = reports, go

    def next_event(self) -> bool:
        """Waits for the next event. Returns: False, if the process has ended instead."""
        return os.read(self._reports, 1) != b""

    def go(self) -> None:
        """Lets the process continue after an event."""
        os.write(self._go, b".")

    def finish(self) -> Ended:
        """Lets the process run to its end."""
        while self.next_event():
            self.go()
        _, status = os.waitpid(self.pid, 0)
        os.close(self._reports)
        os.close(self._go)
        return Ended(os.waitstatus_to_exitcode(status), self._log.read_text(errors="replace"))

    def _run(self, function: Callable[[], object]) -> None:
        """The life of the forked process; it never returns."""
        status = 1
        try:
            log = os.open(self._log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, errors="backslashreplace")
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.alarm(HANG_SECONDS)
            _event.append(self._report)
            status = _status_of(function)
            sys.stdout.flush()
        finally:
            os._exit(status)

    def _report(self) -> None:
        os.write(self._write_report, b".")
        os.read(self._read_go, 1)


_event: list[Callable[[], None]] = []  # in a forked process: how to report an event


def event() -> None:
    """Marks a moment at which a process can be interrupted."""
    for report in _event:
        report()


def _status_of(function: Callable[[], object]) -> int:
    from lab.core import run_folders

    run_folders._owner = os.getpid()  # the locks of this process, not of the one that forked it
    try:
        function()
        return 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code)
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        run_folders.unlock_all()


def run(function: Callable[[], object], folder: Path) -> Ended:
    """Runs a function in a forked process with limited memory."""
    import resource  # not on Windows

    with tempfile.NamedTemporaryFile(dir=folder, prefix=".log") as log:

        def limited() -> None:
            resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
            function()

        return Process(limited, Path(log.name)).finish()


def run_fresh(words: list[str], root: Path, log_folder: Path) -> Ended:
    """Runs a script of the project at `root` in a forked process that imports the project anew.

    This saves the second that the import of PyTorch takes.
    """
    own = {path.stem for path in root.glob("*.py")} | {"lab", "exercise", "benchmarks"}

    def script() -> None:
        for name in [name for name in sys.modules if name.split(".")[0] in own]:
            del sys.modules[name]
        os.chdir(root)
        sys.path.insert(0, str(root))
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")

    return run(script, log_folder)


def end_with_a_sentence(function: Callable[[], object], folder: Path) -> None:
    """Runs a function, which may finish, or raise a UserError that can be printed.

    Raises: Lost, if it ends in another way.
    """
    from lab.core import runtime

    ended = run(lambda: runtime.run_script(function), folder)
    ended.expect(0, 2)
    if unsafe := re.search(r"[\x00-\x08\x0b-\x1f\x7f]", ended.output.replace("\r", "")):
        raise Lost(f"prints the control character {unsafe[0]!r}: {ended.output!r}")


@contextmanager
def trap(folder: Path) -> Iterator[Path]:
    """A path that malicious files try to create.

    Raises: Lost, if it exists afterwards.
    """
    path = folder / "executed"
    yield path
    if path.exists():
        raise Lost("code in the file was executed")
