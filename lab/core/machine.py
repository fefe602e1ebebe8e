"""The machine that a program runs on: its processors, what they can do, and its memory."""

import inspect
import os
import platform
import re
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch


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
