"""The running program: its processes, signals and memory, and the machine that it runs on."""

import inspect
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import timedelta
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.state import AcceleratorState

from lab.core import constants
from lab.core.code import code_hashes, import_model, source_hash, uses_model
from lab.core.errors import UserError, first_line

__all__ = [
    "SCHEMA", "Stopped", "allow_tf32", "avoid_dynamo_import", "bf16_is_faster", "can_compile",
    "code_hashes", "explain_out_of_memory", "first_line", "handle_signals", "hardware", "has_bf16",
    "has_compiler", "import_model", "is_main_process", "load_average", "make_accelerator",
    "peak_memory_mb", "process_state", "provenance", "public_command", "reset_peak_memory",
    "run_script", "source_hash", "uses_model",
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


# --- The machine ---


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
        "hardware": hardware(),
        "load": load_average(),
    }


def public_command(command: str) -> str:
    """A command for others to read: of absolute paths, only the last name is shown."""
    words = (re.sub(r"^(--[\w-]+=)?/.*/(?=[^/])", r"\1", w) for w in shlex.split(command))
    home = str(Path.home())
    return shlex.join(word.replace(home, "~") if len(home) > 1 else word for word in words)


def load_average() -> float | None:
    """The one-minute load average; None on Windows."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None


@cache
def cpu_name() -> str:
    """The name of the processor, such as "AMD EPYC 9B14"; its architecture, if there is none."""
    try:
        with open("/proc/cpuinfo") as file:
            lines = [line for line in file if line.startswith("model name")]
        if lines:
            return lines[0].split(":")[1].strip()
    except OSError:
        pass  # not Linux
    return platform.processor() or platform.machine()


def hardware() -> dict[str, Any]:
    """Names and counts of the processors; nothing that identifies the machine."""
    found = {"cpu": cpu_name(), "cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    if (processes := int(os.environ.get("WORLD_SIZE", 1))) > 1:
        found["processes"] = processes  # each with its own GPU, if there is one
    return found


def has_bf16(device: torch.device) -> bool:
    """Whether the device computes matrix products in bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False


def bf16_is_faster(device: torch.device) -> bool:
    """Whether matrix products are faster in bf16 than in fp32.

    With AVX-512, AMD's cores do twice as many bf16 as fp32 operations per second. Intel's need AMX
    for that; without it, as on many virtual machines, bf16 ran at half the speed of fp32.
    """
    if device.type != "cpu":
        return has_bf16(device)
    return torch.cpu._is_amx_tile_supported() or (has_bf16(device) and "AMD" in cpu_name())


@contextmanager
def allow_tf32(device: torch.device) -> Iterator[None]:
    """Lets fp32 matrix products on a CUDA GPU use TF32, which rounds inputs to a 10-bit mantissa.

    Only for the model: the augmentation's coordinates would be wrong by up to 0.1 pixel.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def avoid_dynamo_import(*functions: Callable) -> None:
    """Keeps the first call of these functions from importing torch._dynamo, which takes seconds.

    PyTorch wraps them to exclude them from compilation, and needs torch._dynamo only for that. We
    compile models, but never these functions. The attribute is PyTorch's private cache for the
    result: a version of PyTorch that does not use it imports torch._dynamo as before.
    """
    for function in functions:
        original = inspect.unwrap(function)
        original.__dynamo_disable = original


def has_compiler() -> bool:
    """Whether there is a C++ compiler, which torch.compile needs."""
    return any(map(shutil.which, ("c++", "g++", "clang++", "cc", "gcc", "clang", "cl")))


def can_compile(device: torch.device) -> bool:
    """Whether torch.compile can generate code for this GPU.

    It needs Triton, a C compiler, and Python's header files, which Linux distributions package
    separately. Triton needs compute capability 7.0.
    """
    return (
        device.type == "cuda"
        and torch.cuda.get_device_capability(device) >= (7, 0)
        and find_spec("triton") is not None
        and has_compiler()
        and _python_header().is_file()
    )


def _python_header() -> Path:
    """Where Triton looks for Python.h."""
    scheme = sysconfig.get_default_scheme().replace("posix_local", "posix_prefix")
    return Path(sysconfig.get_path("include", scheme), "Python.h")


def reset_peak_memory(device: torch.device) -> None:
    """Starts a new measurement for `peak_memory_mb`, where the system allows it."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")  # Linux


def peak_memory_mb(device: torch.device) -> int | None:
    """Peak memory in MB: allocated on a GPU, resident memory of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 10**6
    # On Linux, getrusage would report the peak of the parent process if that was higher.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 // 10**6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 10**6 if sys.platform == "darwin" else peak // 10**3
