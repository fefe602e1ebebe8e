"""Runs a training script as one trial of a sweep, and stops it when the sweep process exits.

    python trial_process.py LOCK SCRIPT [FLAGS]    # started by trials.py

The sweep holds the other end of standard input. That end closes when the sweep stops or prunes the
trial, and also when the sweep is killed. The script then receives SIGTERM, saves and exits. The
lock keeps a second process from working on the same run until this one has exited.
"""

import os
import runpy
import signal
import sys
import threading

from filelock import FileLock


def _stop_with_the_sweep() -> None:
    os.read(0, 1)  # returns at the end of standard input
    signal.raise_signal(signal.SIGTERM)


if __name__ == "__main__":
    lock, *sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))  # as `python SCRIPT` sets it
    threading.Thread(target=_stop_with_the_sweep, daemon=True).start()
    with FileLock(lock):
        runpy.run_path(sys.argv[0], run_name="__main__")
