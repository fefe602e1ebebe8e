"""Drills on a small training run: killed, interrupted, started twice, damaged, without space."""

import csv
import errno
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch._dynamo  # noqa: F401  the profiler imports it; processes forked later share it
from safetensors.torch import load_file

from lab.core import checkpoints, runtime
from lab.data import Loaders
from tests.drills.harness import Attempt, Ended, Lost, Process, event
from tests.figures import blank_figures

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["--dataset", "digits", "--embed-dim", "8", "--depth", "1", "--num-heads", "1",
         "--epochs", "2", "--batch-size", "432", "--results-dir"]  # fmt: skip
MEASURED = {"seconds", "images_per_second", "peak_memory_mb"}  # differ from run to run
VALUES = (b"1" + b"0" * 400, b"NaN", b"\0", b"null", b"[]", b"-1", b'"', b"[" * 9999)
SPACE_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)


def train(folder: Path, *words: str) -> Process:
    """Starts train.py in a forked process; every step and every change of a file is an event."""
    return Process(lambda: _train(folder, words), folder / ".log")


def _train(folder: Path, words: tuple[str, ...]) -> None:
    batches = Loaders.train

    def report_steps(self, *arguments):
        for batch in batches(self, *arguments):
            event()
            yield batch

    Loaders.train = report_steps
    for name in ("replace", "rename"):
        setattr(os, name, _reported(getattr(os, name)))
    sys.argv = [str(ROOT / "train.py"), *WORDS, str(folder / "runs"), *words]
    with blank_figures():
        runpy.run_path(sys.argv[0], run_name="__main__")


def _reported(function: Callable) -> Callable:
    def report(*arguments, **keywords):
        event()
        result = function(*arguments, **keywords)
        event()
        return result

    return report


def run_of(folder: Path) -> Path:
    """The only run. Raises: Lost, if there are several or leftovers."""
    found = sorted(path.name for path in (folder / "runs").iterdir())
    if len(found) != 1:
        raise Lost(f"not one run but {found}")
    return folder / "runs" / found[0]


def result(run: Path) -> tuple:
    """Weights, history without what is measured, and predictions of a run."""
    with open(run / "history.csv", newline="") as file:
        rows = [{k: v for k, v in row.items() if k not in MEASURED} for row in csv.DictReader(file)]
    weights = {name: x.tolist() for name, x in load_file(run / "best.safetensors").items()}
    json.loads((run / "metrics.json").read_text())
    return weights, rows, (run / "predictions.csv").read_text()


@cache
def reference() -> tuple[tuple, int, Path]:
    """The result of a run that nothing disturbs, the number of its events, and its folder."""
    runtime.code_hashes(ROOT / "train.py")  # what is cached here, forked processes need not repeat
    folder = Path(tempfile.mkdtemp(prefix="drills-"))
    process, events = train(folder), 0
    while process.next_event():
        events += 1
        process.go()
    process.finish().expect(0)
    return result(run_of(folder)), events, folder


def expect_reference(folder: Path) -> None:
    """Repeats the command. Raises: Lost, unless the result then equals that of `reference`."""
    train(folder).finish().expect(0)
    if result(run_of(folder)) != reference()[0]:
        raise Lost("the result differs from an undisturbed run")
    if partial := [p.name for p in run_of(folder).rglob("*.part")]:
        raise Lost(f"left over: {partial}")


def disturbed(attempt: Attempt, number: int) -> Ended:
    """Trains, and sends a signal at a random event."""
    process = train(attempt.folder)
    for _ in range(attempt.random.randrange(reference()[1])):
        process.next_event()
        process.go()
    process.next_event()
    os.kill(process.pid, number)
    process.go()
    return process.finish()


def kill(attempt: Attempt) -> None:
    """SIGKILL at any step or change of a file; the same command resumes to the same result."""
    if disturbed(attempt, signal.SIGKILL).status != -signal.SIGKILL:
        raise Lost("it was not killed")
    for path in (attempt.folder / "runs").glob(".*.part"):  # removed after a minute
        shutil.rmtree(path)
    expect_reference(attempt.folder)


def interrupt(attempt: Attempt) -> None:
    """Ctrl-C or SIGTERM at such a moment: a sentence, and the same command resumes."""
    number = attempt.random.choice([signal.SIGINT, signal.SIGTERM])
    ended = disturbed(attempt, number)
    if ended.status != -number:  # SIGTERM before or after training ends a process as always
        ended.expect(0, 128 + number)
    for path in (attempt.folder / "runs").glob(".*.part"):
        shutil.rmtree(path)
    expect_reference(attempt.folder)


def two_processes(attempt: Attempt) -> None:
    """A second process starts in the same folder at any moment; one of them trains."""
    process = train(attempt.folder)
    for _ in range(attempt.random.randrange(reference()[1])):
        process.next_event()
        process.go()
    process.next_event()
    second = Process(lambda: _train(attempt.folder, ()), attempt.folder / ".second").finish()
    second.expect(0, 2)
    if second.status == 2 and "another process" not in second.output:
        raise Lost(f"the second process does not say why: {second.output}")
    process.go()
    first = process.finish()
    first.expect(0, 2)
    if first.status == second.status == 2:
        raise Lost("neither of them trained")
    expect_reference(attempt.folder)


def no_space(attempt: Attempt) -> None:
    """A write fails, or files may not grow; a sentence, and the same command resumes."""
    draw, log = attempt.random, attempt.folder / ".log"
    number = draw.choice(SPACE_ERRORS)
    if draw.random() < 0.5:
        limit = draw.randrange(5_000, 60_000)  # the output of the process fits

        def start() -> None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
            _train(attempt.folder, ())
    else:
        at, name = draw.randrange(12), draw.choice(["mkstemp", "replace", "both"])

        def start() -> None:
            calls = []

            def fail(function: Callable) -> Callable:
                def call(*arguments, **keywords):
                    calls.append(function)
                    if len(calls) > at:
                        raise OSError(number, os.strerror(number))
                    return function(*arguments, **keywords)

                return call

            if name != "replace":
                checkpoints.tempfile.mkstemp = fail(checkpoints.tempfile.mkstemp)
            if name != "mkstemp":
                os.replace = fail(os.replace)
            _train(attempt.folder, ())

    process = Process(start, log)
    ended = process.finish()
    ended.expect(0, 2)
    if ended.status == 2 and "could not write" not in ended.output:
        raise Lost(f"it does not say what could not be written: {ended.output}")
    log.unlink()
    expect_reference(attempt.folder)


def damage(path: Path, draw) -> None:
    """Damages a file in a random way."""
    content = path.read_bytes()
    at = draw.randrange(max(1, len(content)))
    kind = draw.randrange(7)
    if kind == 0:
        path.unlink()
    elif kind == 6:
        path.unlink()
        path.mkdir()
    else:
        flipped = bytes([content[at] ^ (1 << draw.randrange(8))]) if content else b""
        value = draw.choice(VALUES)
        path.write_bytes([
            b"", b"garbage", content[:at], content[:at] + flipped + content[at + 1 :],
            content[:at] + value + content[at + draw.randrange(9) :],
        ][kind - 1])  # fmt: skip


def damaged_run(attempt: Attempt) -> None:
    """A file of a stopped or finished run is damaged; a sentence, and --overwrite repeats it."""
    _, events, finished = reference()
    draw, folder = attempt.random, attempt.folder
    if draw.random() < 0.5:
        shutil.copytree(finished / "runs", folder / "runs")
    else:
        process = train(folder)
        for _ in range(draw.randrange(8, events)):
            process.next_event()
            process.go()
        process.next_event()
        os.kill(process.pid, signal.SIGKILL)
        process.finish()
    run = next(path for path in (folder / "runs").iterdir() if path.suffix != ".part")
    files = sorted(path for path in run.rglob("*") if path.is_file() and path.name != ".lock")
    damage(draw.choice(files), draw)
    train(folder).finish().expect(0, 2)
    (folder / ".log").unlink()
    train(folder, "--overwrite").finish().expect(0)
    newest = max((folder / "runs").glob("*/metrics.json"), key=lambda path: path.stat().st_mtime)
    if result(newest.parent) != reference()[0]:
        raise Lost("the repeated run differs from an undisturbed one")
