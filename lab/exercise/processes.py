"""Runs a submission in a process of its own, with limits on time, memory and file size.

The limits protect a computer from mistakes: endless loops, huge allocations, floods of output. They
are not a sandbox: the code still has all rights of the user who runs it.
"""

import contextlib
import faulthandler
import json
import multiprocessing
import os
import re
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TextIO

import psutil
import torch

from lab.exercise.checks import Result, check_part
from lab.exercise.parts import PARTS
from lab.exercise.submission import Failure, Submission

# A forked process has timm already; elsewhere a new one imports it, which takes seconds.
_CONTEXT = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
_CPU_SIGNAL = getattr(signal, "SIGPROF", 0)  # arrives when the processor time is used up
LOADING = "loading the file"  # the failed check of all parts if the file itself cannot be used
_START = 60.0  # seconds within which a process must be ready
_WAIT = 3  # limit on wall-clock time, as a multiple of the processor time: a submission may sleep
MAX_FILE = 50 * 2**20  # bytes that a submission may write to a file, its output included


@dataclass(frozen=True)
class Job:
    """What is checked, and within which limits."""

    model_file: Path
    steps_file: Path | None
    parts: tuple[str, ...]
    seed: int
    weights: Path
    seconds: float  # of processor time for a part, so that a busy computer changes nothing
    memory_mb: int  # in addition to what PyTorch and timm take


def run_checks(
    job: Job, on_result: Callable[[Result], None] = lambda result: None
) -> tuple[list[Result], str]:
    """Checks the parts of a job; if a part hangs or dies, only that part fails.

    Args:
        job: what is checked.
        on_result: called with each result as soon as it is there.

    Returns: the results in the order of the parts, and what the submission printed.
    """
    results: list[Result] = []
    with tempfile.TemporaryDirectory(prefix="vit-exercise-") as folder:
        output, trace = Path(folder, "output.txt"), Path(folder, "trace.txt")
        while len(results) < len(job.parts):
            todo = replace(job, parts=job.parts[len(results) :])
            for result in _run_once(todo, output, trace):
                is_function = PARTS[result.part].is_function
                if result.failed == LOADING and is_function and job.steps_file:
                    # The model cannot be loaded, but the functions do not need it.
                    job = replace(job, model_file=job.steps_file, steps_file=None)
                    break
                results.append(result)
                on_result(result)
        printed = output.read_text("utf-8", errors="replace") if output.exists() else ""
        return results, printed


def _run_once(job: Job, output: Path, trace: Path) -> Iterator[Result]:
    """Yields results from one process, until all are there or it ends."""
    receiver, sender = _CONTEXT.Pipe(duplex=False)
    process = _CONTEXT.Process(target=_work, args=(sender, job, output, trace), daemon=True)
    # A forked process inherits a timer of the parent, but not its thread, and would wait for it.
    faulthandler.cancel_dump_traceback_later()
    process.start()
    sender.close()
    try:
        if _receive(receiver, _START) is None:
            yield from _all_failed(job, "the process for the check did not start")
            return
        for number, part in enumerate(("", *job.parts)):  # first the file as a whole is loaded
            passed = []
            while (message := _receive(receiver, _WAIT * job.seconds + 2)) and "check" in message:
                passed.append(message["check"])
            if message is None:
                process.join(2)
                sentence = _explain_end(process, trace, job)
                if number == 0:
                    yield from _all_failed(job, sentence)
                else:
                    yield Result(part, passed, _next_check(part, passed), sentence)
                return
            if "failure" in message:
                yield from _all_failed(job, message["failure"])
                return
            if number > 0:
                yield Result(**message)
    finally:
        _kill(process)
        receiver.close()


def _receive(receiver: Connection, seconds: float) -> dict | None:
    """A message as JSON, never unpickled; None if the process ends or sends nothing in time."""
    try:
        message = json.loads(receiver.recv_bytes(1_000_000)) if receiver.poll(seconds) else None
        return message if isinstance(message, dict) else None
    except (EOFError, OSError, ValueError):
        return None


def _kill(process: multiprocessing.Process) -> None:
    """Ends a process and those that it started."""
    if hasattr(os, "killpg"):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join()


def _explain_end(process: multiprocessing.Process, trace: Path, job: Job) -> str:
    """Why a process gave no result, with the line that it had reached if that is known."""
    files = [str(file) for file in (job.model_file, job.steps_file) if file]
    text = trace.read_text(errors="replace") if trace.exists() else ""
    frames = re.findall(r'File "(.+)", line (\d+)', text)
    place = next((f"{Path(f).name}, line {n}: " for f, n in frames if f in files), "")
    if "Timeout" in text or process.exitcode is None or -process.exitcode == _CPU_SIGNAL > 0:
        return f"{place}still running after {job.seconds:g} seconds; is this an endless loop?"
    if process.exitcode < 0:
        name = signal.Signals(-process.exitcode).name
        return f"{place}the process was killed by the signal {name}"
    return f"{place}your code ended the process (exit status {process.exitcode})"


def _next_check(part: str, passed: list[str]) -> str:
    """The first check of a part that has not passed."""
    return next(check for check in PARTS[part].checks if check not in passed)


def _all_failed(job: Job, sentence: str) -> list[Result]:
    return [Result(part, failed=LOADING, says=sentence) for part in job.parts]


def _work(sender: Connection, job: Job, output: Path, trace: Path) -> None:
    """What runs in the new process."""
    if hasattr(os, "setsid"):
        os.setsid()  # one signal ends everything that a submission starts
    log = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    sys.stdout = sys.stderr = os.fdopen(log, "w", buffering=1, errors="replace")
    torch.set_num_threads(1)
    with open(trace, "w") as file:
        faulthandler.enable(file)
        _set_limits(job.memory_mb)
        sys.path.insert(0, str(job.model_file.parent))
        _send(sender, {"ready": True})
        if hasattr(signal, "setitimer"):
            faulthandler.register(_CPU_SIGNAL, file, all_threads=False, chain=True)
        _start_clock(job.seconds, file)
        try:
            submission = Submission.load(job.model_file, job.steps_file)
        except Failure as failure:
            _send(sender, {"failure": str(failure)})
            return
        _send(sender, {"loaded": True})
        for part in job.parts:
            _start_clock(job.seconds, file)
            passed: list[str] = []

            def on_passed(check: str, passed: list[str] = passed) -> None:
                passed.append(check)
                _send(sender, {"check": check})

            try:
                result = check_part(submission, part, job.seed, job.weights, on_passed)
            except Exception as error:  # not the student's fault, but the others must go on
                says = f"the checker itself failed ({type(error).__name__}: {error})"
                result = Result(part, passed, _next_check(part, passed), says)
            _send(sender, asdict(result))
        faulthandler.cancel_dump_traceback_later()
        if hasattr(signal, "setitimer"):
            signal.setitimer(signal.ITIMER_PROF, 0)
    os._exit(0)  # what a submission registered to run at exit does not run


def _start_clock(seconds: float, file: TextIO) -> None:
    """Ends this process after some seconds of processor time; `file` then says where it was.

    Windows cannot measure that, so seconds of real time count there.
    """
    has_timer = hasattr(signal, "setitimer")
    if has_timer:
        signal.setitimer(signal.ITIMER_PROF, seconds)
    faulthandler.dump_traceback_later(
        _WAIT * seconds if has_timer else seconds, exit=True, file=file
    )


def _send(sender: Connection, message: dict) -> None:
    sender.send_bytes(json.dumps(message).encode())


def _set_limits(memory_mb: int) -> None:
    """Limits memory and file size. Windows and macOS do not support this; time is limited there."""
    if sys.platform != "linux":
        return
    import resource  # exists on Unix only

    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + memory_mb * 2**20,) * 2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_FILE,) * 2)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
