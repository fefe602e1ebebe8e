"""A run that receives a signal at a known step."""

import os
import runpy
import sys
from pathlib import Path

from lab.data import Loaders
from tests.drills.harness import Ended, Process, event

ROOT = Path(__file__).resolve().parents[2]


def interrupt(words: list[str], number: int, at: tuple[int, int], log: Path) -> Ended:
    """Runs a script in a forked process and sends it a signal before step `at`, (epoch, step)."""
    batches = Loaders.train

    def held_batches(self, epoch, first_step=0):
        for step, batch in enumerate(batches(self, epoch, first_step), first_step):
            if (epoch, step) == at:
                event()
            yield batch

    def script():
        Loaders.train = held_batches
        os.chdir(ROOT)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")

    process = Process(script, log)
    assert process.next_event()
    os.kill(process.pid, number)
    process.go()
    return process.finish()
