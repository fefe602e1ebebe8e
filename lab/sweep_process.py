"""A trial's run: a process of its own, whose history can be read while it is written."""

import csv
import hashlib
import json
import os
import re
import socket
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from lab.core.runs import Run
from lab.sweep_script import Params
from lab.sweep_space import show

HOST = hashlib.blake2b(socket.gethostname().encode(), digest_size=4).hexdigest()
PATIENCE = 300  # seconds that a run which was left behind may take to save itself


class RunProcess:
    """A run of a script, started now; what it says goes into a file."""

    def __init__(self, command: list[str], place: Path, name: str, log: Path, threads: int | None):
        """
        Args:
            command: the script and its flags, without place and name.
            place: the folder for the run's folder.
            name: of the run; another run may have taken it, and then it is called `-2`, ...
            log: the file, which is added to.
            threads: for the run to take, unless OMP_NUM_THREADS is set; None leaves it alone.
        """
        self.place, self.name, self.log = place, name, log
        self.before = self.histories()
        self.path: Path | None = None  # of its history.csv
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        if threads:
            environment.setdefault("OMP_NUM_THREADS", str(threads))
        words = [sys.executable, *command, "--results-dir", str(place), "--name", name]
        with open(log, "ab") as output:
            self.process = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C is the sweep's, which tells its runs, once
                creationflags=getattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 0),  # on Windows
            )  # fmt: skip

    def histories(self) -> dict[Path, int]:
        """The histories of runs with this name, and when each was written."""
        runs = re.compile(re.escape(self.name) + r"(-\d+)?")
        found = [p for p in self.place.glob("*/history.csv") if runs.fullmatch(p.parent.name)]
        return {path: path.stat().st_mtime_ns for path in found}

    def rows(self) -> list[dict[str, float]]:
        """The epochs so far; those that a run which goes on had before are among them."""
        changed = {p: at for p, at in self.histories().items() if self.before.get(p) != at}
        self.path = max(changed, key=changed.__getitem__, default=self.path)
        return rows_of(self.path)

    def result(self) -> tuple[Path | None, str | None]:
        """After the end: the run's folder, if it has one, and why it failed, if it did, in a line.

        A run that was finished before trains nothing, and says where its records are.
        """
        self.rows()
        text = self.log.read_text(encoding="utf-8", errors="replace")
        said = [line.strip() for line in text.splitlines() if line.strip()]
        status, error = self.process.returncode, None
        if status == 0:
            ends = [line for line in said if line.endswith("curves.png")]
            self.path = Path(ends[-1]).with_name("history.csv") if ends else None
            error = None if rows_of(self.path) else "it left no history"
        elif status < 0:
            error = f"ended by signal {-status}{' (out of memory?)' if status == -9 else ''}"
        else:
            error = said[-1].removeprefix("error: ") if said else f"ended with status {status}"
        return self.path.parent if self.path else None, error


def run_name(params: Params) -> str:
    """The name of a trial's run, and of its folder: `learning_rate0.001-batch_size32`."""
    text = "-".join(f"{name.lower()}{show(value)}" for name, value in params.items())
    return re.sub(r"[^\w.=+-]+", "_", text)[:120]


def rows_of(path: Path | None) -> list[dict[str, float]]:
    """The whole rows of a history.csv, which may be missing, or in the middle of being written."""
    try:
        text = path.read_text(encoding="utf-8") if path else ""
    except OSError:
        return []
    rows = csv.DictReader(text[: text.rfind("\n") + 1].splitlines())
    return [{k: json.loads(row[k]) for k in ("epoch", "val_accuracy", "seconds")} for row in rows]


def summary(folder: Path | None, error: str | None) -> dict[str, Any]:
    """What a sweep keeps of a run: its best validation accuracy, epochs, seconds of training."""
    rows = rows_of(folder / "history.csv" if folder else None)
    seconds = sum(row["seconds"] for row in rows)
    with suppress(OSError, KeyError):  # of a finished one, with the features of a head
        seconds = Run(folder).metrics()["training_seconds"] if folder else seconds
    return {
        "val_accuracy": max((row["val_accuracy"] for row in rows), default=None),
        "epochs": len(rows),
        "seconds": round(seconds, 1),
        "folder": folder.name if folder else None,
        "error": error,
    }


def name_of(pid: int) -> list[Any]:
    """What tells a process from all others: machine, number, and when it was born."""
    return [HOST, pid, psutil.Process(pid).create_time()]


def process_of(name: list[Any] | None) -> psutil.Process | None:
    """The process of that name, if it lives on this machine."""
    with suppress(psutil.Error):
        if name and name[0] == HOST:
            process = psutil.Process(name[1])
            same = abs(process.create_time() - name[2]) < 2
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    return None


def end(name: list[Any] | None) -> None:
    """Tells a run that was left behind to save itself, and waits for that."""
    if process := process_of(name):
        with suppress(psutil.NoSuchProcess):
            process.terminate()
            with suppress(psutil.TimeoutExpired):
                process.wait(PATIENCE)
            process.kill()
