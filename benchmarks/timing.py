"""What the benchmarks share: clocks, turns, the matrix product that takes its turn, the machine."""

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import (
    get_all_start_methods,
    get_context,
    get_start_method,
    set_start_method,
)
from multiprocessing.connection import Connection
from typing import Any

import torch

from lab.core import runtime

PRODUCT = "product"  # among the names of those that take turns: a square matrix product
PRODUCTS = {"cpu": (2048, 5), "cuda": (8192, 50)}  # its side, and how many in a row


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


def product(device: str, dtype: torch.dtype) -> Callable[[], None]:
    """A turn of the matrix product: what the machine can do in the same minute as the peers."""
    n, times = PRODUCTS.get(device, PRODUCTS["cpu"])
    a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))

    def work() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return work


def product_flop(device: str) -> int:
    """Floating-point operations of such a turn."""
    n, times = PRODUCTS.get(device, PRODUCTS["cpu"])
    return 2 * n**3 * times


def hardware(device: str) -> str:
    """The GPU's name, or the CPU's with the threads in use."""
    found = runtime.hardware()
    if device == "cuda":
        return found["gpu"]
    capability = torch.backends.cpu.get_cpu_capability()
    threads = found["threads"]
    return f"{found['cpu']}, {capability}, {threads} thread{'s' * (threads > 1)}"


def alternate(
    works: dict[str, Callable[[], float]], repeats: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Seconds that each work says it took, one after the other, `repeats` times.

    In another order at every turn: who always follows the same neighbour finds its caches.
    """
    times: dict[str, list[float]] = {name: [] for name in works}
    order, shuffled = list(works), random.Random(0)
    for turn in range(warmup + repeats):
        for name in order:
            spent = works[name]()
            if turn >= warmup:
                times[name].append(spent)
        shuffled.shuffle(order)
    return times


class Turns:
    """A peer's end of the line: it waits until it is called, and tells what its turn cost."""

    def __init__(self, line: Connection, device: torch.device):
        self.line, self.device = line, device

    def begin(self) -> None:
        self.line.recv()
        self.start = time.perf_counter()

    def end(self) -> None:
        synchronize(self.device.type)
        self.line.send((time.perf_counter() - self.start, runtime.peak_memory_mb(self.device)))

    def take(self, work: Callable[[], object]) -> None:
        """Does `work` in every turn, until EOFError: nobody calls any more, see `answer`."""
        while True:
            self.begin()
            work()
            self.end()


def in_turns(
    peer: Callable[[str, dict, Connection], None],
    names: list[str],
    values: dict[str, Any],
    repeats: int,
    warmup: int = 1,
) -> tuple[dict[str, list[float]], dict[str, int]]:
    """Seconds of each peer's turns, one peer after the other, and each one's peak memory in MB.

    Args:
        peer: runs in a process for each name, and calls `Turns.begin` and `end` at every turn.
        names: of the peers.
        values: for `peer`, such as the script's constants, which a new process does not inherit.
        repeats: turns that count.
        warmup: turns before them; the peers get ready during the first one.

    Raises: SystemExit, naming a peer whose process died.
    """
    memory: dict[str, int] = {}
    with started(peer, names, values) as lines:

        def call(name: str) -> float:
            try:
                lines[name].send("go")
                spent, memory[name] = lines[name].recv()
            except (EOFError, OSError):
                raise SystemExit(f"{name} failed: see above") from None
            return spent

        works = {name: lambda name=name: call(name) for name in names}
        return alternate(works, repeats, warmup), memory


@contextmanager
def started(
    peer: Callable[[str, dict, Connection], None], names: list[str], values: dict[str, Any]
) -> Iterator[dict[str, Connection]]:
    """A line to each peer, in a process of its own, all of which end with the context."""
    # A fork server imports once what all need; it uses no GPU, and no threads, which forks break.
    server = "forkserver" in get_all_start_methods()
    context, lines, running = get_context("forkserver" if server else "spawn"), {}, []
    if server:
        needed = [name for name in sys.modules if name.startswith(("lab.", "benchmarks."))]
        context.set_forkserver_preload(needed)
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
