"""Trains on photographs that are ten times larger than the memory that training may use.

    python -m benchmarks.bounded_memory    # Linux, as root; 8 GB of disk, 7 minutes on two cores

Creates a folder of JPEG photographs (links to a few files) and runs `python train.py` on it in
a memory cgroup: decoding, an epoch in random order, validation and test. A control run shows that
the limit is real, because it has to fail: a process that holds all decoded images in memory.

A cgroup counts all memory that its processes use, including cached pages of files. When memory runs
short, the kernel reclaims those pages, and if that is not enough, it kills.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from benchmarks import table
from lab.core import UserError, constants, runtime
from lab.data import Preprocess

# --- What is measured ---
LIMIT_MB: int = 800  # includes the interpreter and all libraries
TIMES: float = 10.0  # size of the decoded images, divided by the limit
IMG_SIZE: int = 224  # pixels of the model's input
BATCH_SIZE: int = 16  # images per step
# --- Where ---
SCRATCH: str = ""  # folder for images and cache; empty: the system's temporary folder
OUT: str = "benchmarks/local/bounded_memory.md"  # .md and .json; empty: nowhere

DISTINCT = 4  # photographs per class; the others are links to them
TINY_MODEL = {
    "PATCH_SIZE": 32, "EMBED_DIM": 32, "DEPTH": 1, "NUM_HEADS": 1, "EPOCHS": 1, "RRC_MIN_AREA": 0,
    "AUTO_AUGMENT": "none", "RANDOM_ERASING": 0, "MIXUP": 0, "CUTMIX": 0, "PRECISION": "fp32",
    "FLIP": False,
}  # fmt: skip
# The files of a memory cgroup: where it lies, the limit, and the peak (v2: Linux 5.19 or later).
CGROUPS = {
    1: ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.max_usage_in_bytes"),
    2: ("/sys/fs/cgroup", "memory.max", "memory.peak"),
}


@dataclass(frozen=True)
class Outcome:
    """How a command ended under a limit; sizes in bytes."""

    limit: int
    status: int  # of the process; -9: killed
    output: str
    seconds: float
    peak: int | None

    @property
    def ending(self) -> str:
        if self.status == 0:
            return "finished"
        if self.status == -signal.SIGKILL:
            return "killed by the kernel"
        lines = [line for line in self.output.splitlines() if line.strip()]
        return f"failed: {lines[-1][:120] if lines else f'status {self.status}'}"


def run_limited(command: Sequence[str], limit: int) -> Outcome:
    """Runs a command in its own memory cgroup with a limit in bytes.

    Raises: UserError, if no memory cgroup can be created here.
    """
    version = 1 if Path(CGROUPS[1][0], CGROUPS[1][1]).exists() else 2
    root, limit_file, peak_file = CGROUPS[version]
    group = Path(root, f"vit-lab-{os.getpid()}")
    try:
        group.mkdir()
        (group / limit_file).write_text(str(limit))
        for swap, value in (("memory.memsw.limit_in_bytes", limit), ("memory.swap.max", 0)):
            if (group / swap).exists():  # not every kernel counts swap
                (group / swap).write_text(str(value))
        started = time.perf_counter()
        done = subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            preexec_fn=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
        )  # fmt: skip
        seconds, peak = time.perf_counter() - started, None
        with suppress(OSError):
            peak = int((group / peak_file).read_text())
        return Outcome(limit, done.returncode, done.stdout, seconds, peak)
    except OSError as error:
        raise UserError(f"no memory cgroup can be created (Linux, as root): {error}") from None
    finally:
        for _ in range(50):  # a killed process takes a moment to leave
            if group.exists():
                with suppress(OSError):
                    group.rmdir()
                time.sleep(0.1)


def make_photographs(root: Path, count: int) -> None:
    """Creates `root/train/{day,night}/*.jpg`, half of `count` each, as links to a few files."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("day", "night")):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for i in range(DISTINCT):
            pixels = rng.integers(128 - 128 * label, 256 - 128 * label, (12, 16, 3), np.uint8)
            image = Image.fromarray(pixels).resize((320, 256), Image.Resampling.BICUBIC)
            image.save(root / f"{name}-{i}.jpg", quality=85)
        for i in range(count // 2):
            os.link(root / f"{name}-{i % DISTINCT}.jpg", folder / f"{i:06}.jpg")


def train_command(root: Path) -> list[str]:
    flags = {**TINY_MODEL, "IMG_SIZE": IMG_SIZE, "BATCH_SIZE": BATCH_SIZE,
             "DATASET": root / "photographs", "RESULTS_DIR": root / "runs"}  # fmt: skip
    return [sys.executable, "train.py", *constants.as_flags(flags)]


def measure(scratch: Path) -> tuple[str, dict]:
    """The table and the record of all runs, with images and caches in `scratch`."""
    limit, image = LIMIT_MB * 10**6, 3 * Preprocess.resized_size(IMG_SIZE, 0.875) ** 2
    count = -(-int(TIMES * limit) // image // 2) * 2
    print(f"{count:,} photographs: {count * image / 1e9:.2f} GB decoded")
    make_photographs(scratch / "photographs", count)
    command = train_command(scratch)
    trained = run_limited(command, limit)
    print(trained.output)
    if trained.status:
        raise UserError(f"the run did not stay below {LIMIT_MB} MB: {trained.ending}")
    (cache,) = (scratch / "photographs" / "vit-lab-cache").glob("*.npy")
    size = cache.stat().st_size
    hold = [sys.executable, "-c", f"import numpy; print(numpy.load({str(cache)!r}).sum())"]
    runs = {
        "train.py: decode, train, validate, test": trained,
        "the decoded images held in memory": run_limited(hold, limit),
    }
    if sum(run.status == 0 for run in runs.values()) > 1:
        raise UserError("a run that should not fit into memory finished (is TIMES below 1?)")
    cells = [
        [name, f"{run.limit / 1e6:,.0f}", f"{run.peak / 1e6:,.0f}" if run.peak else "-",
         f"{run.seconds:,.0f}", run.ending]
        for name, run in runs.items()
    ]  # fmt: skip
    record = {**table.provenance(), "images": count, "decoded_bytes": size,
              "runs": {name: asdict(run) for name, run in runs.items()}}  # fmt: skip
    text = "\n".join([
        f"Training on {count:,} photographs, {size / 1e9:.2f} GB decoded, {size / limit:.1f} times "
        f"the memory limit. {table.describe_hardware('cpu')}.", "", f"`{record['command']}`", "",
        *table.to_markdown(["run", "limit MB", "peak MB", "seconds", "ending"], cells),
    ])  # fmt: skip
    return text, record


def main() -> None:
    constants.override(sys.modules[__name__])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # deletes the photographs, too
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's driver needs memory of its own
    with tempfile.TemporaryDirectory(prefix="vit-lab-", dir=SCRATCH or None) as scratch:
        text, record = measure(Path(scratch))
    print(text)
    if OUT:
        table.write(Path(OUT), text, record)


if __name__ == "__main__":
    runtime.run_script(main)
