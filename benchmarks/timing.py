"""What the benchmarks share: clocks, the machine in words, and where a table goes."""

import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context, get_start_method, set_start_method
from multiprocessing.connection import Connection
from typing import Any

import torch

from lab import runs
from lab.compute import peak_memory_mb


def synchronize(device: str) -> None:
    """Waits until a GPU has done what it was given."""
    if device == "cuda":
        torch.cuda.synchronize()


def seconds(work: Callable[[], object], device: str, times: int = 1) -> float:
    """Wall-clock seconds of one call of `work`, the mean of `times` in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        work()
    synchronize(device)
    return (time.perf_counter() - start) / times


def matmul_rate(device: str, dtype: torch.dtype, n: int = 2048) -> float:
    """FLOP/s of an n x n x n matrix product, the median of 10 after a warm-up."""
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    seconds(lambda: a @ b, device, times=3)
    times = [seconds(lambda: a @ b, device, times=3) for _ in range(10)]
    return 2 * n**3 / statistics.median(times)


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    found = runs.hardware()
    if device == "cuda":
        return found["gpu"]
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{found['cpu']}, {capability}, {found['threads']} threads"


def keep(table: str, path: str) -> None:
    """Prints a table, and writes it to `path`; an empty one: nowhere."""
    print(table)
    if path:
        os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
        with open(path, "w", encoding="utf-8") as file:
            file.write(table + "\n")


class Turns:
    """A peer's end of the line: it waits until it is called, and tells what its turn cost."""

    def __init__(self, line: Connection, device: torch.device):
        self.line, self.device = line, device

    def begin(self) -> None:
        self.line.recv()
        self.start = time.perf_counter()

    def end(self) -> None:
        synchronize(self.device.type)
        self.line.send((time.perf_counter() - self.start, peak_memory_mb(self.device)))


def in_turns(
    peer: Callable[[str, dict, Connection], None], names: list[str], values: dict, turns: int
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each peer's turns, one peer after the other, and each one's peak memory in MB.

    Args:
        peer: runs in a process for each name, and calls `Turns.begin` and `end` so many times.
        names: of the peers.
        values: for `peer`, such as the script's constants, which a new process does not inherit.
        turns: how many there are.
    """
    times: dict[str, list[float]] = {name: [] for name in names}
    memory = {}
    with started(peer, names, values) as lines:
        for _ in range(turns):
            for name, line in lines.items():
                try:
                    line.send("go")
                    spent, memory[name] = line.recv()
                except (EOFError, OSError):
                    raise SystemExit(f"{name} failed: see above") from None
                times[name].append(spent)
    return times, memory


@contextmanager
def started(
    peer: Callable[[str, dict, Connection], None], names: list[str], values: dict[str, Any]
) -> Iterator[dict[str, Connection]]:
    """A line to each peer, in a process of its own, all of which end with the context."""
    context, lines, running = get_context("spawn"), {}, []
    try:
        for name in names:
            lines[name], theirs = context.Pipe()
            given = (get_start_method(), peer, name, values, theirs)
            running.append(context.Process(target=answer, args=given))
            running[-1].start()
            theirs.close()  # else a peer that dies would not be noticed
        yield lines
    finally:
        for line in lines.values():
            line.close()
        for process in running:
            process.join(10)
            process.terminate()


def answer(
    method: str, peer: Callable, name: str, values: dict[str, Any], line: Connection
) -> None:
    set_start_method(method, force=True)  # a DataLoader's workers start as in any script
    with suppress(EOFError, BrokenPipeError):  # nobody calls any more
        peer(name, values, line)
