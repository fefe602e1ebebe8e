"""Seconds from starting Python to the end of the first training step, on digits.

    python -m benchmarks.startup                         # about two minutes on two CPU cores

Every measurement is a fresh process that trains the same small ViT with the same batch size and
optimizer; the libraries alternate.

- ours: train.py itself, stopped after its first step. Its records go to a temporary folder.
- timm: its model, create_loader and create_optimizer_v2, in the loop of its train.py.
- transformers: ViTForImageClassification and Trainer.
- torchvision: its VisionTransformer, transforms and a DataLoader, in a plain loop.

All read the images in the same way; the other libraries get them with three channels.
"""

import subprocess
import sys
import time
from statistics import median

from benchmarks import table
from benchmarks.first_step import IMPORTED, MEMORY, STEPPED
from benchmarks.timing import alternate
from lab.core import constants, runtime

# --- What is measured ---
LIBRARIES: str = "ours,timm,transformers,torchvision"  # in the order of the table
EMBED_DIM: int = 64  # the sizes of train.py on digits
DEPTH: int = 4  # blocks
NUM_HEADS: int = 4  # attention heads
BATCH_SIZE: int = 64  # images per step
# --- How it is measured ---
WORKERS: int = 0  # processes of the others' DataLoaders; 0 is the fastest start
REPEATS: int = 3  # measurements, after one that does not count
OUT: str = "benchmarks/local/startup-{device}.md"  # where the table goes; empty: nowhere


def start(library: str) -> tuple[float, float, int | None]:
    """Starts a library's process.

    Returns: seconds to the end of its imports and of its first step, and its peak memory in MB.
    Raises: SystemExit, if it failed before.
    """
    sizes = map(str, (EMBED_DIM, DEPTH, NUM_HEADS, BATCH_SIZE, WORKERS))
    command = [sys.executable, "-m", "benchmarks.first_step", library, *sizes]
    events, started = {}, time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            events.setdefault(line.strip(), time.perf_counter() - started)
    if not {IMPORTED, STEPPED} <= events.keys():
        raise SystemExit(f"{library} failed: see the error above")
    memory = [int(e.split()[-1]) for e in events if e.startswith(MEMORY) and e[-1].isdigit()]
    return events[IMPORTED], events[STEPPED], memory[0] if memory else None


def main() -> None:
    constants.override(sys.modules[__name__])
    names, notes = table.installed_libraries(LIBRARIES.split(","))
    imports: dict[str, list[float]] = {name: [] for name in names}
    memory: dict[str, int] = {}

    def first_step(name: str) -> float:
        imported, stepped, memory[name] = start(name)
        imports[name].append(imported)
        return stepped

    times = alternate({name: lambda name=name: first_step(name) for name in names}, REPEATS)
    rows = table.compare("start-up to the first step", times, table.OURS, names, memory=memory)
    seconds = ", ".join(f"{name} {median(imports[name][1:]):.2f} s" for name in names)
    notes.append(f"Time to the end of the imports: {seconds}.")
    title = (
        f"Start-up to the end of the first training step: digits, width {EMBED_DIM}, depth {DEPTH},"
        f" batch {BATCH_SIZE}, DataLoaders with {WORKERS} workers; medians of {REPEATS} repeats."
    )
    table.save(OUT, title, rows, notes=notes)


if __name__ == "__main__":
    runtime.run_script(main)
