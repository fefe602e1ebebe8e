"""Another program that this one starts, and that saves its state when it is stopped."""

import os
import signal
import subprocess
from typing import Any

from lab.core.runtime import Stopped


def stop(process: subprocess.Popen, number: int) -> None:
    """Passes Ctrl-C on as such, and any other signal, or any on Windows, as SIGTERM."""
    if number == signal.SIGINT and os.name == "posix":
        process.send_signal(number)
    else:
        process.terminate()


def run_child(words: list[str], where: str, **options: Any) -> int:
    """Runs a program and waits until it ends. Ctrl-C and SIGTERM are passed on to it.

    Args:
        words: the program and its arguments.
        where: how far this program has got, for the message of Stopped.
        options: of `subprocess.Popen`.

    Returns: its exit status.
    Raises: Stopped, after a signal, once the program has saved its state and ended.
    """
    process: subprocess.Popen | None = None
    stopped: list[int] = []

    def forward(number: int, _: Any) -> None:
        stopped.append(number)
        if process:
            stop(process, number)

    names = ("SIGINT", "SIGTERM", "SIGHUP")  # Windows has no SIGHUP, which a lost terminal sends
    numbers = [getattr(signal, name) for name in names if hasattr(signal, name)]
    before = {
        number: signal.signal(number, forward)
        for number in numbers
        if signal.getsignal(number) != signal.SIG_IGN  # nohup ignores SIGHUP
    }
    try:
        # In its own session, it receives signals only from this process, not from the terminal.
        process = subprocess.Popen(words, start_new_session=True, **options)
        if stopped:  # the signal arrived before the process was started
            stop(process, stopped[0])
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise Stopped(stopped[0], where)
    return status
