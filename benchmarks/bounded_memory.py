"""Trains on photographs ten times as large as the memory that training may use.

    python -m benchmarks.bounded_memory        # Linux; 8 GB of disk, 7 minutes on two busy cores

Makes a folder of JPEG photographs, hard links to a few, and runs `python train.py` on it under a
limit of memory: decoding, an epoch in random order, validation, test. Then it shows that the limit
is one: the same run under a quarter of it, and all the decoded images held in memory under the same
limit, must both fail. RLIMIT_DATA also counts what is reserved and never used, so that libraries
alone need about a gigabyte of it: where no cgroup can be made it takes 15 GB of disk.
"""

import json
import os
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image

from benchmarks.memory_limit import Outcome, can_group, run_limited
from benchmarks.table import command as typed
from benchmarks.timing import hardware
from lab.core import constants, runtime
from lab.data import Preprocess

# --- What is measured ---
LIMIT_MB: int | None = None  # interpreter and libraries included; none: 800, RLIMIT_DATA 1500
TIMES: float = 10.0  # decoded images / limit
LIMIT_BY: Literal["auto", "cgroup", "rlimit"] = "auto"  # auto: a cgroup where one can be made
IMG_SIZE: int = 224  # pixels that the model sees
BATCH_SIZE: int = 16  # images a step
# --- Where ---
SCRATCH: str = ""  # folder for images and cache, 10 times the limit; empty: the system's
OUT: str = "benchmarks/local/bounded_memory"  # .md and .json; empty: nowhere

DISTINCT = 4  # photographs of each class; the others are links to them
MODEL = {  # as small as can be: this is about feeding
    "PATCH_SIZE": 32, "EMBED_DIM": 32, "DEPTH": 1, "NUM_HEADS": 1, "EPOCHS": 1, "RRC_MIN_AREA": 0,
    "AUTO_AUGMENT": "none", "RANDOM_ERASING": 0, "MIXUP": 0, "CUTMIX": 0, "PRECISION": "fp32",
}  # fmt: skip


def make_photographs(root: Path, count: int) -> None:
    """`root/train/{day,night}/*.jpg`, half of `count` each, links to a few files."""
    rng = np.random.default_rng(0)
    for label, name in enumerate(("day", "night")):
        folder = root / "train" / name
        folder.mkdir(parents=True)
        for i in range(DISTINCT):
            pixels = rng.integers(128 - 128 * label, 256 - 128 * label, (12, 16, 3), np.uint8)
            picture = Image.fromarray(pixels).resize((320, 256), Image.Resampling.BICUBIC)
            picture.save(root / f"{name}-{i}.jpg", quality=85)
        for i in range(count // 2):
            source, target = root / f"{name}-{i % DISTINCT}.jpg", folder / f"{i:06}.jpg"
            try:
                os.link(source, target)
            except OSError:  # a file system without hard links, or with few of them
                shutil.copy(source, target)


def train_command(root: Path) -> list[str]:
    flags = {**MODEL, "IMG_SIZE": IMG_SIZE, "BATCH_SIZE": BATCH_SIZE, "RESULTS_DIR": root / "runs"}
    words = [f"--{name.lower().replace('_', '-')}={value}" for name, value in flags.items()]
    return [sys.executable, "train.py", "--dataset", str(root / "photographs"), *words, "--no-flip"]


def ending(outcome: Outcome) -> str:
    """How a command ended, in words."""
    if outcome.status == 0:
        return "finished"
    if outcome.status == -signal.SIGKILL:
        return "killed by the kernel"
    last = [line for line in outcome.output.splitlines() if line.strip()]
    return f"failed: {last[-1][:120] if last else f'status {outcome.status}'}"


def row(what: str, outcome: Outcome) -> str:
    cells = (outcome.limit, outcome.anonymous, outcome.private, outcome.counted)
    figures = " | ".join("-" if cell is None else f"{cell / 1e6:,.0f}" for cell in cells)
    return f"| {what} | {figures} | {outcome.seconds:,.0f} | {ending(outcome)} |"


def measure(scratch: Path) -> tuple[str, dict]:
    """The table and the record of all runs, with images and caches below `scratch`."""
    kept = Preprocess.resized_size(IMG_SIZE, 0.875)  # as train.py keeps photographs
    grouped = LIMIT_BY == "cgroup" or (LIMIT_BY == "auto" and can_group())
    limit, image = (LIMIT_MB or (800 if grouped else 1500)) * 10**6, 3 * kept**2
    count = -(-int(TIMES * limit) // image // 2) * 2
    print(f"{count:,} photographs of {kept} pixels: {count * image / 1e9:.2f} GB decoded")
    make_photographs(scratch / "photographs", count)
    command = train_command(scratch)
    trained = run_limited(command, limit, LIMIT_BY)
    print(trained.output)
    if trained.status:
        raise SystemExit(f"the run did not stay below {limit / 1e6:.0f} MB: {ending(trained)}")
    (cache,) = (scratch / "photographs" / "vit-lab-cache").glob("*.npy")
    size = cache.stat().st_size
    hold = [sys.executable, "-c", f"import numpy; print(numpy.load({str(cache)!r}).sum())"]
    held = run_limited(hold, limit, LIMIT_BY)
    low = run_limited(command, limit // 4, LIMIT_BY)
    if not held.status or not low.status:
        raise SystemExit("the limit is none: what should not fit did (is TIMES below 1?)")
    steps = [line for line in trained.output.splitlines() if line.startswith("epoch")]
    words = typed("bounded_memory")
    table = "\n".join([
        f"Training on {count:,} photographs, {size / 1e9:.2f} GB decoded, {size / limit:.1f} times "
        f"the limit of memory, set by: {trained.by}. {hardware('cpu')}; torch "
        f"{torch.__version__}.", "",
        f"`{words}`", "",
        "| run | limit MB | own memory, peak MB | private maps, peak MB | counted, peak MB | "
        "seconds | ended |",
        "|---|---|---|---|---|---|---|",
        row("train.py: decode, train, validate, test", trained),
        row("the decoded images held in memory", held),
        row("train.py under a quarter of the limit", low), "",
        "Own memory is what belongs to no file (RssAnon); private maps are what RLIMIT_DATA "
        "counts; a cgroup counts pages of files too, up to the limit, and takes them back.", "",
        *(f"    {line}" for line in steps),
    ])  # fmt: skip
    record = {**runtime.provenance(), "command": words, "images": count, "decoded_bytes": size,
              "limited_by": trained.by}  # fmt: skip
    for name, outcome in (("train", trained), ("hold", held), ("low", low)):
        record[name] = {k: v for k, v in vars(outcome).items() if k != "output"}
        record[name]["ended"] = ending(outcome)
    return table, record


def main() -> None:
    constants.override(sys.modules[__name__])
    if not sys.platform.startswith("linux"):
        raise SystemExit("limits of memory are those of Linux: run this there")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # and the photographs go too
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU's driver takes memory of its own
    with tempfile.TemporaryDirectory(prefix="vit-lab-", dir=SCRATCH or None) as scratch:
        table, record = measure(Path(scratch))
    print(table)
    if OUT:
        Path(OUT).parent.mkdir(parents=True, exist_ok=True)
        Path(f"{OUT}.md").write_text(table + "\n", encoding="utf-8")
        Path(f"{OUT}.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
