"""Mistakes that a user can mend end as one sentence, never as a traceback.

Of several processes the first speaks for all.
"""

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any

import torch

from lab.core.runtime import is_launched, is_main_process, original_command
from model import ConfigError

LAUNCHER_GRACE_SECONDS = 20  # seconds; a launcher that sees one process fail ends the others sooner


class UserError(Exception):
    """What is wrong, where, and what to do about it, in words for the person at the keyboard."""


class Stopped(Exception):
    """A run was told to stop by signal `number` and has saved itself; `where` says how far."""

    def __init__(self, number: int, where: str):
        super().__init__(f"stopped and saved at {where}")
        self.number = number


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's `main`; mistakes and interruptions end with a sentence and a status."""
    try:
        with silence_other_processes():
            main()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
    except (UserError, ConfigError) as error:
        wait_for_launcher()
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        if is_main_process():
            again = [word for word in original_command() if word != "--overwrite"]
            print(f"{stopped}\ngo on with: {shlex.join(again)}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (Exception, SystemExit):
        wait_for_launcher()
        raise


@contextmanager
def silence_other_processes() -> Iterator[None]:
    """What the other processes print goes nowhere."""
    if is_main_process():
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def wait_for_launcher() -> None:
    """Processes mostly fail together: all but the first on a machine wait to be ended by then.

    One that fails alone, or whose failure is only that the first has gone, speaks a little later.
    """
    if not is_main_process("LOCAL_RANK"):
        time.sleep(LAUNCHER_GRACE_SECONDS)


@contextmanager
def handle_signals() -> Iterator[list[int]]:
    """A list that gets the number of the first Ctrl-C or SIGTERM; a second one ends at once.

    Under a launcher it does not: a launcher passes on what the terminal has told us already, and
    itself ends at once what has not ended after half a minute.
    """
    stop: list[int] = []

    def handle(number: int, _: Any) -> None:
        if stop and not is_launched():
            raise KeyboardInterrupt
        if not stop:
            again = "" if is_launched() else " (again: at once)"
            print(f"\nstopping after this step{again}", file=sys.stderr)
        stop.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
    finally:
        if not (stop and is_launched()):  # what the launcher passes on may come as late as the end
            for number, handler in zip(numbers, before, strict=True):
                signal.signal(number, handler)


@contextmanager
def explain_out_of_memory(advice: str) -> Iterator[None]:
    """Too little memory, on a GPU or a CPU, ends with advice instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(f"not enough memory. {advice}") from error
