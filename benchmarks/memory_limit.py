"""A command under a real limit of memory: a memory cgroup where one can be made, else RLIMIT_DATA.

A cgroup counts all memory that its processes touch, pages of mapped files included: these are taken
back when memory gets short, and when that is not enough the kernel kills. RLIMIT_DATA counts what
a process may write to and shares with nobody, used or not; beyond it allocations fail.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

V1 = ("memory.limit_in_bytes", "memory.max_usage_in_bytes")
V2 = ("memory.max", "memory.peak")
EVERY = 0.05  # seconds between two looks at a process


@dataclass(frozen=True)
class Outcome:
    """How a command under a limit ended; bytes."""

    limit: int
    by: str  # what limited it
    status: int  # of the process; -9: killed
    output: str
    seconds: float
    anonymous: int  # the most memory of its own that was resident at a look
    private: int  # the most that RLIMIT_DATA counts
    counted: int | None  # the most that the cgroup counted, pages of files included


class Cgroup:
    """A memory cgroup of its own for one command."""

    def __init__(self, folder: Path, names: tuple[str, str]):
        self.folder, self.names = folder, names

    @classmethod
    def make(cls, limit: int) -> "Cgroup | None":
        """One with a limit in bytes; None where this system or user cannot have one."""
        for root, names in roots():
            made = cls(root / f"vit-lab-{os.getpid()}", names)
            try:
                made.folder.mkdir()
                (made.folder / names[0]).write_text(str(limit))
            except OSError:
                made.remove()
                continue
            for swap in ("memory.memsw.limit_in_bytes", "memory.swap.max"):
                with suppress(OSError):  # not every kernel counts swap; without it none is used
                    value = limit if swap.startswith("memory.memsw") else 0
                    if (made.folder / swap).exists():
                        (made.folder / swap).write_text(str(value))
            return made
        return None

    def join(self) -> None:
        """Puts the calling process, and what it starts from now on, under the limit."""
        (self.folder / "cgroup.procs").write_text(str(os.getpid()))

    def most(self) -> int | None:
        with suppress(OSError, ValueError):  # memory.peak is of Linux 5.19
            return int((self.folder / self.names[1]).read_text())
        return None

    def remove(self) -> None:
        for _ in range(50):  # a killed process takes a moment to leave
            with suppress(FileNotFoundError):
                try:
                    self.folder.rmdir()
                except OSError:
                    time.sleep(0.1)
                    continue
            return


def roots() -> list[tuple[Path, tuple[str, str]]]:
    """Where memory cgroups can be, with the names of their files."""
    found = []
    with suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, place, kind, options, *_ = line.split()
            if kind == "cgroup" and "memory" in options.split(","):
                found.append((Path(place), V1))
            elif kind == "cgroup2":
                control = Path(place, "cgroup.subtree_control")
                if control.exists() and "memory" in control.read_text().split():
                    found.append((Path(place), V2))
    return found


def can_group() -> bool:
    """Whether memory cgroups can be made here."""
    group = Cgroup.make(10**9)
    if group:
        group.remove()
    return group is not None


def run_limited(command: Sequence[str], limit: int, by: str = "auto") -> Outcome:
    """Runs a command under a limit in bytes. `by`: auto, cgroup or rlimit.

    Raises: SystemExit, where a cgroup is wanted and cannot be made.
    """
    group = Cgroup.make(limit) if by != "rlimit" else None
    if by == "cgroup" and not group:
        raise SystemExit("no memory cgroup can be made here (are you root?): --limit-by rlimit")

    def limited() -> None:
        if group:
            group.join()
        else:
            import resource

            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    started, anonymous, private = time.perf_counter(), 0, 0
    try:
        with tempfile.TemporaryFile() as output:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, preexec_fn=limited,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )  # fmt: skip
            try:
                while process.poll() is None:
                    seen = status_of(process.pid)
                    anonymous = max(anonymous, seen.get("RssAnon", 0))
                    private = max(private, seen.get("VmData", 0))
                    time.sleep(EVERY)
            finally:
                process.kill()
                process.wait()
            output.seek(0)
            text = output.read().decode(errors="replace")
        seconds = time.perf_counter() - started
        counted, name = (group.most(), "memory cgroup") if group else (None, "RLIMIT_DATA")
        return Outcome(limit, name, process.returncode, text, seconds, anonymous, private, counted)
    finally:
        if group:
            group.remove()


def status_of(pid: int) -> dict[str, int]:
    """Bytes from /proc/<pid>/status, by name; {} once the process has ended."""
    with suppress(OSError):
        text = Path(f"/proc/{pid}/status").read_text()
        return {k: 1024 * int(v) for k, v in re.findall(r"^(\w+):\s+(\d+) kB$", text, re.M)}
    return {}
