"""All benchmarks of speed, and one table of their results.

    python -m benchmarks                     # about 40 minutes on two CPU cores
    python -m benchmarks --quick             # tiny sizes, to check that everything runs here
    python -m benchmarks --parts startup     # one part

Each part is a script, `python -m benchmarks.<part>`, and runs in its own process. If one fails, it
is reported, the others run, and the exit status is 1. Libraries that are not installed are skipped
with a note; `pip install -r requirements-dev.txt` installs them.
"""

import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import table
from lab.core import UserError, checkpoints, constants, runtime

PARTS: str | None = None  # names separated by commas; None: all
QUICK: bool = False  # tiny sizes, whose results mean nothing
REPEATS: int | None = None  # of every part; None: each part's own number
OUT: str = "benchmarks/local"  # the folder of the tables

CPU_FLAGS = {  # in this order; on a GPU, the parts' own constants
    "limits": "",
    "model_speed": "",
    "attention_maps": "--model vit_small_patch16_224 --batch-size 16",
    "data_feeding": "",
    "finetune_head": "--repeats 3",
    "startup": "",
}
QUICK_FLAGS = {
    "limits": "--repeats 2 --copy-mb 8 --product-side 256",
    "model_speed": "--rounds 1 --repeats 2 --steps 1 --embed-dim 128 --depth 1 --batch-size 4 "
    "--workers 1 --product-side 256 "
    "--workloads 'training, fp32;training with data, fp32;inference, fp32'",
    "attention_maps": "--repeats 2 --model vit_tiny_patch16_224 --img-size 32 --batch-size 2",
    "data_feeding": "--repeats 2 --batches 3 --workers 1",
    "finetune_head": "--repeats 1 --epochs 1 --workers 1",
    "startup": "--repeats 1 --depth 1",
}


def run(part: str, device: str) -> tuple[dict[str, Any] | None, str]:
    """Runs a part. Returns its record, if it wrote one, and a sentence if it failed."""
    flags = QUICK_FLAGS[part] if QUICK else CPU_FLAGS[part] if device != "cuda" else ""
    words = shlex.split(flags) + (["--repeats", str(REPEATS)] if REPEATS else [])
    out = Path(OUT, f"{part}-{device}.md")
    record_path = out.with_suffix(".json")
    record_path.unlink(missing_ok=True)  # the record of an earlier run
    command = [sys.executable, "-m", f"benchmarks.{part}", *words, "--out", str(out)]
    with tempfile.TemporaryFile("w+") as log:
        status = subprocess.call(command, stdout=log, stderr=subprocess.STDOUT)
        log.seek(0)
        last = [line for line in log.read().splitlines() if line.strip()][-5:]
    record = checkpoints.read_json(record_path) if record_path.exists() else None
    if status == 0 and record:
        return record, ""
    print("\n" + "\n".join(f"    {line}" for line in last), file=sys.stderr)
    return record, f"{part} failed with status {status}: {last[-1] if last else 'no output'}"


def main() -> None:
    constants.override(sys.modules[__name__])
    device = runtime.process_state().device.type
    parts = PARTS.split(",") if PARTS else list(CPU_FLAGS)
    if unknown := [part for part in parts if part not in CPU_FLAGS]:
        raise UserError(f"PARTS: {unknown[0]!r} is none of {', '.join(CPU_FLAGS)}")
    Path(OUT).mkdir(parents=True, exist_ok=True)
    records, failures, started = [], [], time.monotonic()
    for number, part in enumerate(parts, 1):
        print(f"{number}/{len(parts)}  {part:<15}", end="", flush=True)
        part_started = time.monotonic()
        record, failure = run(part, device)
        records += [record] if record else []
        failures += [failure] if failure else []
        print(f"{failure or 'done'}, {time.monotonic() - part_started:.0f} s")
    text = table.render(records, failures)
    path = Path(OUT, f"table-{device}.md")
    table.write(path, text, {**table.provenance(), "parts": records, "failures": failures})
    print(f"\n{text}\n\n{time.monotonic() - started:.0f} s in total\n{path}")
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    runtime.run_script(main)
