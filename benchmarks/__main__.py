"""Every benchmark one after another, and one table of all: `python -m benchmarks`.

    python -m benchmarks                     # about 15 minutes on two CPU cores
    python -m benchmarks --quick             # tiny sizes: does all of it run?
    python -m benchmarks --parts startup     # one part; finetune_full takes 6 minutes on a CPU

A part is a script of its own, `python -m benchmarks.<part>`, and runs in a process of its own; one
that fails is reported, the others go on, and the exit status is 1. Peers that are not installed
are left out with a remark: `pip install -r requirements-dev.txt`.
"""

import json
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import table
from benchmarks.timing import hardware
from lab.core import checkpoints, constants, runtime

# --- What is measured ---
PARTS: str | None = None  # in this order; none: all, finetune_full on a GPU only
QUICK: bool = False  # tiny sizes, whose figures mean nothing
# --- How it is measured ---
REPEATS: int | None = None  # of every part; none: each part's own number
OUT: str = "benchmarks/local"  # the folder of the tables

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {  # on a CPU; on a GPU the parts' own constants
    "limits": "",
    "model_speed": "",
    "attention_maps": "--model vit_small_patch16_224 --batch-size 16",
    "data_feeding": "",
    "finetune_head": "--repeats 3",
    "startup": "",
    "finetune_full": "",
}
QUICK_FLAGS = {
    "limits": "--repeats 2 --copy-mb 8",
    "model_speed": "--rounds 1 --repeats 2 --steps 1 --embed-dim 128 --depth 1 --batch-size 4 "
    "--works 'training, fp32;inference, fp32'",
    "attention_maps": "--repeats 2 --model vit_tiny_patch16_224 --img-size 32 --batch-size 2",
    "data_feeding": "--repeats 2 --batches 3 --workers 1",
    "finetune_head": "--repeats 1 --epochs 1",
    "startup": "--repeats 1 --depth 1",
    "finetune_full": "--repeats 1 --steps 1 --model vit_tiny_patch16_224 --batch-size 2 "
    "--workers 1",
}


def words_of(part: str, device: str, out: str) -> list[str]:
    """A part's command behind the interpreter."""
    flags = QUICK_FLAGS[part] if QUICK else FLAGS[part] if device != "cuda" else ""
    words = ["-m", f"benchmarks.{part}", *shlex.split(flags), "--out", out]
    return words + (["--repeats", str(REPEATS)] if REPEATS else [])  # the last one counts


def run(part: str, device: str, folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Runs a part. Returns its record, if it left one, and what went wrong, if anything did."""
    out = folder / f"{part}-{device}.md"
    with tempfile.TemporaryDirectory() as scratch, tempfile.TemporaryFile("w+") as log:
        # Records go to a folder of their own first: one from an earlier run is none of this one.
        made = Path(scratch) / out.name
        words = [sys.executable, *words_of(part, device, str(made))]
        with subprocess.Popen(words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # the part got it too
                process.wait()
                raise SystemExit(130) from None
        record = None
        if made.with_suffix(".json").exists():
            record = json.loads(made.with_suffix(".json").read_text(encoding="utf-8"))
            for path in (made, made.with_suffix(".json")):
                text = path.read_text(encoding="utf-8").replace(str(made), str(out))
                (folder / path.name).write_text(text, encoding="utf-8")
            record["command"] = record["command"].replace(str(made), str(out))
        if status == 0 and record:
            return record, ""
        log.seek(0)
        last = [line for line in log.read().splitlines() if line.strip()][-5:]
    print("\n" + "\n".join(f"    {line}" for line in last), file=sys.stderr)
    return record, f"{part} failed with status {status}: {last[-1] if last else 'it said nothing'}"


def main() -> None:
    constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    parts = PARTS.split(",") if PARTS else [p for p in FLAGS if p != "finetune_full"]
    if not PARTS and device == "cuda":
        parts.append("finetune_full")
    for part in parts:
        if part not in FLAGS:
            raise SystemExit(f"--parts: {part!r} is none of {', '.join(FLAGS)}")
    folder = Path(OUT)
    folder.mkdir(parents=True, exist_ok=True)
    records, failed, started = [], [], time.monotonic()
    for number, part in enumerate(parts, 1):
        print(f"{number}/{len(parts)}  {part:<15}", end="", flush=True)
        since = time.monotonic()
        record, wrong = run(part, device, folder)
        records += [record] if record else []
        failed += [wrong] if wrong else []
        print(f"{wrong or 'done'}, {time.monotonic() - since:.0f} s")
    lines = table.whole(records, failed, hardware(device))
    path = folder / f"table-{device}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    checkpoints.write_json(
        path.with_suffix(".json"), {**table.whence(""), "parts": records, "failed": failed}
    )
    print("\n".join(["", *lines, "", f"{time.monotonic() - started:.0f} s in all", str(path)]))
    if failed:
        sys.exit(1)


if __name__ == "__main__":
    main()
