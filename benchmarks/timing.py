"""How speeds are measured: clocks, alternating measurements, and processes that take them."""

import random
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_all_start_methods, get_context, get_start_method, set_start_method
from multiprocessing.connection import Connection
from typing import Any

import torch

from lab.core import machine, runtime

Times = dict[str, list[float]]  # seconds of each repeat, by name

MATRIX_PRODUCT = "matrix product"  # measured in alternation with the libraries, as a reference
PRODUCT_SIZES = {"cpu": (2048, 5), "cuda": (8192, 50)}  # side of the matrices, products in a row


def synchronize(device: str) -> None:
    """Waits until a GPU has finished its queue of kernels."""
    if device != "cpu":
        torch.accelerator.synchronize()


def seconds(workload: Callable[[], object], device: str, times: int = 1) -> float:
    """Wall-clock seconds of one call of a workload: the mean of `times` calls in a row."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(times):
        workload()
    synchronize(device)
    return (time.perf_counter() - start) / times


def matrix_product(
    device: str, dtype: torch.dtype, side: int | None = None
) -> tuple[Callable[[], None], int]:
    """A workload of products of square matrices, and its floating-point operations.

    side: of the matrices; None: large enough to reach the device's highest rate.
    """
    n, times = PRODUCT_SIZES.get(device, PRODUCT_SIZES["cpu"])
    n = side or n
    a, b, out = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(3))

    def workload() -> None:
        for _ in range(times):
            torch.mm(a, b, out=out)

    return workload, 2 * n**3 * times


def alternate(workloads: dict[str, Callable[[], float]], repeats: int, warmup: int = 1) -> Times:
    """Runs workloads in alternation; each call returns the seconds that it took.

    The order is shuffled in every repeat, so that no workload always runs after the same one and
    profits from, or suffers for, the state of the caches that it left. `warmup` repeats come first
    and do not count.
    """
    times: Times = {name: [] for name in workloads}
    order, rng = list(workloads), random.Random(0)
    for repeat in range(warmup + repeats):
        for name in order:
            spent = workloads[name]()
            if repeat >= warmup:
                times[name].append(spent)
        rng.shuffle(order)
    return times


class Worker:
    """A worker process's end of its connection: waits for each measurement and reports it."""

    def __init__(self, connection: Connection, device: torch.device):
        self.connection, self.device = connection, device

    def start(self) -> None:
        """Waits for a request, then starts the clock. Raises EOFError after the last request."""
        if self.connection.recv() == "end":
            raise EOFError
        self.started = time.perf_counter()

    def stop(self) -> None:
        """Stops the clock, and reports the seconds and the peak memory of the process."""
        synchronize(self.device.type)
        spent = time.perf_counter() - self.started
        self.connection.send((spent, machine.peak_memory_mb(self.device)))

    def serve(self, workload: Callable[[], object]) -> None:
        """Measures a workload at every request."""
        while True:
            self.start()
            workload()
            self.stop()


Target = Callable[[str, dict[str, Any], Worker], None]


def alternate_processes(
    target: Target, names: list[str], settings: dict[str, Any], repeats: int, warmup: int = 1
) -> tuple[Times, dict[str, int]]:
    """Measures workloads in alternation, each in its own process.

    Args:
        target: called in each process with its name, `settings` and a Worker, whose `start` and
            `stop` it calls around each measurement. It is also set up by the first request.
        names: of the processes.
        settings: for `target`, such as the script's constants, which processes do not inherit.
        repeats: measurements that count.
        warmup: measurements before them.

    Returns: seconds and peak memory in MB, by name.
    Raises: SystemExit, naming a process that died.
    """
    memory: dict[str, int] = {}
    with _workers(target, names, settings) as connections:

        def request(name: str) -> float:
            try:
                connections[name].send("start")
                spent, memory[name] = connections[name].recv()
            except (EOFError, OSError):
                raise SystemExit(f"{name} failed: see the error above") from None
            return spent

        workloads = {name: lambda name=name: request(name) for name in names}
        return alternate(workloads, repeats, warmup), memory


@contextmanager
def _workers(
    target: Target, names: list[str], settings: dict[str, Any]
) -> Iterator[dict[str, Connection]]:
    """Connections to a process for each name; the processes end with the context."""
    # A fork server imports what all processes need only once.
    has_fork_server = "forkserver" in get_all_start_methods()
    context = get_context("forkserver" if has_fork_server else "spawn")
    if has_fork_server:
        needed = [name for name in sys.modules if name.startswith(("lab.", "benchmarks."))]
        context.set_forkserver_preload(needed)
    connections, processes = {}, []
    try:
        for name in names:
            connections[name], other_end = context.Pipe()
            arguments = (get_start_method(), target, name, settings, other_end)
            processes.append(context.Process(target=_run_worker, args=arguments))
            processes[-1].start()
            other_end.close()  # so that `recv` raises EOFError if the process dies
        yield connections
    finally:
        for connection in connections.values():
            # A forked worker holds copies of earlier connections: closing them does not end it.
            with suppress(OSError):  # it has died
                connection.send("end")
            connection.close()
        for process in processes:
            process.join(10)
            process.terminate()


def _run_worker(
    start_method: str, target: Target, name: str, settings: dict, connection: Connection
) -> None:
    set_start_method(start_method, force=True)  # of DataLoader workers, as in any script
    with suppress(EOFError, BrokenPipeError):  # the last measurement has been taken
        target(name, settings, Worker(connection, runtime.process_state().device))
