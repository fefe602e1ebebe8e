"""Another program that this one starts, and that saves its state when it is stopped."""

import signal
import subprocess
from typing import Any

from lab.core.runtime import Stopped


def run_child(words: list[str], where: str, **options: Any) -> int:
    """Runs a program and waits until it ends; it gets SIGTERM when this program is stopped.

    It does not get the SIGINT of Ctrl-C, which programs in the background of a script ignore.

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
            process.terminate()

    numbers = [signal.SIGINT, signal.SIGTERM]
    # A lost terminal sends SIGHUP, unless nohup started this program. Windows does not have it.
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, forward) for number in numbers}
    try:
        # In its own session, it receives signals only from this process, not from the terminal.
        process = subprocess.Popen(words, start_new_session=True, **options)
        if stopped:  # the signal arrived before the process was started
            process.terminate()
        status = process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if stopped:
        raise Stopped(stopped[0], where)
    return status
