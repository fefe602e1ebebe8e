"""Mistakes that a user can mend end as one sentence, never as a traceback."""

import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from model import ConfigError


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
        main()
    except (UserError, ConfigError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except Stopped as stopped:
        again = [word for word in sys.argv if word != "--fresh"]
        print(f"{stopped}\ngo on with: {shlex.join(['python', *again])}", file=sys.stderr)
        sys.exit(128 + stopped.number)
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """A list that gets the number of the first Ctrl-C or SIGTERM; a second one ends at once."""
    stop: list[int] = []

    def handle(number: int, _: Any) -> None:
        if stop:
            raise KeyboardInterrupt
        stop.append(number)
        print("\nstopping after this step (again: at once)", file=sys.stderr)

    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, handle) for number in numbers]
    try:
        yield stop
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


@contextmanager
def memory_advice(advice: str) -> Iterator[None]:
    """Too little memory, on a GPU or a CPU, ends with advice instead of a traceback."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "allocate memory" not in str(error):
            raise
        raise UserError(f"not enough memory. {advice}") from error
