"""The processes that train together: one, or as many as accelerate or torchrun started."""

import os
import sys
from datetime import timedelta
from pathlib import Path

import psutil
import torch
from accelerate import PartialState

TIMEOUT = timedelta(hours=2)  # for each other: one process downloads and decodes for all


def process_state() -> PartialState:
    """Accelerate's view of them: `process_index`, `num_processes`, `device`, ...

    Accelerate lets processes on CPUs find each other only when it is told that CPUs are meant.
    """
    return PartialState(cpu=not torch.accelerator.is_available(), timeout=TIMEOUT)


def is_launched() -> bool:
    """Whether a launcher started this process, alone or with others."""
    return "LOCAL_RANK" in os.environ


def is_main_process(of: str = "RANK") -> bool:
    """Whether this is the first process of all, or (LOCAL_RANK) the first on its machine.

    Unlike `processes`, it needs no other process to answer.
    """
    return int(os.environ.get(of, 0)) == 0


def original_command() -> list[str]:
    """The words of the command that started this process, as somebody typed them."""
    if is_launched():
        try:
            program, *words = psutil.Process(os.getppid()).cmdline()  # the launcher's
        except psutil.Error:
            program, *words = sys.argv
        if Path(program).name.startswith("python") and words and words[0][0] != "-":
            program, *words = words  # torchrun and accelerate are scripts
        if sys.argv[0] in words:
            name = Path(program).name
            return ["python" if name.startswith("python") else name, *words]
    return ["python", *sys.argv]
