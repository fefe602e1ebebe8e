"""Runs one or more scripts in the processes of a single launch, which saves start-up time.

    torchrun --nproc-per-node 2 tests/training/launched.py train.py --epochs 1 + finetune.py

"{rank}" in a word becomes the number of the process.

HOLD=PIPE makes every process print "held" and wait before step HOLD_AT (epoch,step; default 2,4)
until a process of this launch receives a signal. A test can then interrupt the run at a known
place without sleeping. The processes tell each other about the signal through the named pipe,
which they create. Each further signal is answered by the line "signal".
"""

import os
import runpy
import signal
import sys
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from lab.core import runtime
from lab.data import loaders

try:
    from tests.figures import blank_figures
except ModuleNotFoundError:  # in a hand-out
    from contextlib import nullcontext as blank_figures

HOLD_AT = tuple(map(int, os.environ.get("HOLD_AT", "2,4").split(",")))


def hold_training(path: Path) -> None:
    """Makes every process wait at HOLD_AT until one of them has received a signal."""
    batches, install = loaders.Loaders.train, signal.signal
    with suppress(FileExistsError):
        os.mkfifo(path)
    pipe = os.open(path, os.O_RDWR)

    def held_batches(self, epoch, first_step=0):
        for step, batch in enumerate(batches(self, epoch, first_step), first_step):
            if (epoch, step) == HOLD_AT:
                print("held", flush=True)
                os.write(pipe, os.read(pipe, 1))  # waits, and passes the news on
            yield batch

    def install_and_touch(number, handler):
        def report_and_handle(*arguments):
            os.write(pipe, b".")
            os.write(1, b"signal\n")
            handler(*arguments)

        return install(number, report_and_handle if callable(handler) else handler)

    loaders.Loaders.train, signal.signal = held_batches, install_and_touch


if __name__ == "__main__":
    runtime.process_state()
    if path := os.environ.get("HOLD"):
        hold_training(Path(path))
    destroy = torch.distributed.destroy_process_group
    torch.distributed.destroy_process_group = lambda: None  # the next script needs it
    for is_separator, words in groupby(sys.argv[1:], lambda word: word == "+"):
        if not is_separator:
            sys.argv = [word.format(rank=os.environ.get("RANK", 0)) for word in words]
            with blank_figures():
                runpy.run_path(sys.argv[0], run_name="__main__")
    if torch.distributed.is_initialized():
        torch.distributed.barrier()  # the process that holds the store must not leave first
        destroy()
