"""The running program: its processes, how a script ends, and the provenance of its records."""

import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from lab.core import constants, machine
from lab.core.code import code_hashes, import_model, source_hash, uses_model
from lab.core.errors import UserError, first_line

__all__ = [
    "SCHEMA", "Stopped", "code_hashes", "explain_out_of_memory", "first_line", "handle_signals",
    "import_model", "is_main_process", "make_accelerator", "process_state", "provenance",
    "public_command", "run_script", "source_hash", "uses_model",
]  # fmt: skip

# How long processes wait for each other: one of them downloads and decodes the data for all.
_TIMEOUT = timedelta(hours=2)
# How long the other processes wait for the launcher, which terminates them when one of them fails.
_LAUNCHER_GRACE_SECONDS = 20
_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "numpy")
# A program that starts scripts names a file in this environment variable. Scripts append the paths
# of their run folders to it, so the program need not parse what they print.
RUN_FOLDERS_VARIABLE = "VIT_LAB_RUN_FOLDERS"
SCHEMA = 1  # version of the record format; readers refuse other versions


# --- Processes ---


def process_state() -> PartialState:
    """Accelerate's state of all processes: `process_index`, `num_processes`, `device`, ...

    On a machine without a GPU, Accelerate connects the processes only with `cpu=True`.

    Raises: UserError, if a launcher started more processes than this machine has GPUs.
    """
    processes, gpus = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), torch.cuda.device_count()
    if processes > gpus > 0:
        raise UserError(
            f"{processes} processes were started, but this machine has {gpus} GPU(s), and each "
            f"process needs its own: start {gpus} (torchrun: --nproc-per-node {gpus}; accelerate: "
            f"--num_processes {gpus})"
        )
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=_TIMEOUT)


def make_accelerator(mixed_precision: str) -> Accelerator:
    """Accelerate's interface, with the timeout of `process_state`.

    An earlier run of this process, as in a notebook, may have used another precision.
    """
    process_state()
    AcceleratorState._reset_state()
    # Some containers allow TF32 everywhere; `allow_tf32` allows it for the model only.
    torch.set_float32_matmul_precision("highest")
    return Accelerator(mixed_precision=mixed_precision)


def _is_launched() -> bool:
    """Whether torchrun or accelerate started this process."""
    return "LOCAL_RANK" in os.environ


def is_main_process(rank_variable: str = "RANK") -> bool:
    """Whether this is the main process.

    Unlike `process_state().is_main_process`, it works before the processes are connected.

    Args:
        rank_variable: "RANK" for the main process of all, "LOCAL_RANK" for that of this machine.
    """
    return int(os.environ.get(rank_variable, 0)) == 0


def _original_command() -> list[str]:
    """A command that repeats what this process does, as a list of arguments.

    It is the command that started the process, including torchrun or accelerate, followed by a flag
    for each constant that was edited in the script.
    """
    edited = constants.as_flags(constants.running.edited)
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    if spec and spec.origin == sys.argv[0]:  # started with python -m
        return ["python", "-m", spec.name.removesuffix(".__main__"), *sys.argv[1:], *edited]
    if _is_launched():
        try:
            program, *words = psutil.Process(os.getppid()).cmdline()  # the launcher's
        except psutil.Error:
            program, *words = sys.argv
        if Path(program).name.startswith("python") and words and words[0][0] != "-":
            program, *words = words  # torchrun and accelerate are scripts that Python runs
        if sys.argv[0] in words:
            name = Path(program).name
            return ["python" if name.startswith("python") else name, *words, *edited]
    return ["python", *sys.argv, *edited]


# --- How a script ends ---


class Stopped(Exception):
    """Training stopped after signal `number` and saved its state; `where` says how far it got."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped and saved at {where}")
        self.number = number


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's `main`; user errors and interruptions end with a message and exit status."""
    try:
        with _silence_other_processes():
            main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (UserError, *_config_errors()) as error:
        _wait_for_launcher()
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if is_main_process():
            print(f"{stopped}{_resume_line()}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        if is_main_process():
            print(f"\ninterrupted; the saved files are intact{_resume_line()}", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:  # nobody reads the output any more, as after `python train.py | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except (Exception, SystemExit):
        _wait_for_launcher()
        raise


def _config_errors() -> tuple[type[Exception], ...]:
    """The exception of model.py for an invalid configuration, if model.py was imported.

    It is not imported above because in the exercise it is a student's unfinished file, and
    exercise.py must start even if that is not valid Python.
    """
    found = getattr(sys.modules.get("model"), "ConfigError", None)
    return (found,) if found else ()


def _resume_line() -> str:
    """How to resume; empty if another program started this one, which then prints its own line."""
    if RUN_FOLDERS_VARIABLE in os.environ:
        return ""
    words = [word for word in _original_command() if word != "--overwrite"]
    if constants.running.edited.get("OVERWRITE"):  # set in the script itself
        words.append("--no-overwrite")
    return f"\nresume with: {shlex.join(words)}"


@contextmanager
def _silence_other_processes() -> Iterator[None]:
    """Discards the output of all processes but the main one."""
    if is_main_process():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def _wait_for_launcher() -> None:
    """Lets the main process report an error before the others do.

    Processes usually fail together, and then the launcher ends the others while they wait here. A
    process that fails by itself, or only because the main process has ended, reports a little
    later.
    """
    if not is_main_process("LOCAL_RANK"):
        time.sleep(_LAUNCHER_GRACE_SECONDS)


@contextmanager
def handle_signals() -> Iterator[list[int]]:
    """Collects Ctrl-C and SIGTERM in a list, so that training can save its state and stop.

    The first signal's number is appended to the list; a second signal raises KeyboardInterrupt.
    Under a launcher it does not: a launcher repeats the signal that the terminal already sent, and
    kills what is still running after half a minute.
    """
    stop: list[int] = []

    def handle(number: int, _: Any) -> None:
        if stop and not _is_launched():
            raise KeyboardInterrupt
        if not stop:
            again = "" if _is_launched() else " (press again to stop at once)"
            print(f"\nstopping after this step{again}", file=sys.stderr)
        stop.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
    finally:
        if not (stop and _is_launched()):  # the launcher's copy may still arrive
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Turns an out-of-memory error, on a GPU or a CPU, into a UserError with advice."""
    try:
        yield
    except (RuntimeError, MemoryError, TypeError) as error:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        # The allocators of the CPU, cuBLAS and cuDNN raise a plain RuntimeError.
        phrases = ("allocate memory", "ALLOC_FAILED", "out of memory", "Overflow when unpacking")
        if not out_of_memory and not any(phrase in str(error) for phrase in phrases):
            raise
        raise UserError(f"not enough memory. {advice}") from error


# --- Provenance ---


def provenance() -> dict[str, Any]:
    """Command, time, commit, versions, hardware and load: what is needed to repeat a run."""

    def git(*words: str) -> str | None:
        here = Path(__file__).parent
        done = subprocess.run(("git", *words), cwd=here, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else None

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    try:
        commit, changes = git("rev-parse", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:  # git is not installed
        commit = changes = None
    return {
        "schema": SCHEMA,
        "command": shlex.join(
            os.path.basename(word) if word == sys.argv[0] else word for word in _original_command()
        ),
        "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "commit": commit,
        "uncommitted_changes": bool(changes) if changes is not None else None,
        "python": platform.python_version(),
        "versions": {package: installed(package) for package in _PACKAGES},
        "hardware": machine.hardware(),
        "load": machine.load_average(),
    }


def public_command(command: str) -> str:
    """A command for others to read: of absolute paths, only the last name is shown."""
    words = (re.sub(r"^(--[\w-]+=)?/.*/(?=[^/])", r"\1", w) for w in shlex.split(command))
    home = str(Path.home())
    return shlex.join(word.replace(home, "~") if len(home) > 1 else word for word in words)
