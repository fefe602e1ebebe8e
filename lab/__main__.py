"""Runs the whole lab offline on the bundled data: `make lab`, or `python -m lab`.

Prints one line per part, and at the end the report's summary; the output of the parts goes to
results/lab.log. A finished part is not repeated unless code or weights have changed since, and a
stopped part resumes.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import torch

from lab.core import Run, UserError, checkpoints, runtime
from lab.report import comparisons, read_runs, sentences

ROOT = Path(__file__).resolve().parents[1]


class Part(NamedTuple):
    """One script of the lab."""

    title: str
    command: str
    seconds: int  # on two idle cores with AVX-512


PARTS = [  # fewer epochs than the scripts' defaults where those take over ten minutes
    Part("a ViT from scratch", "train.py", 35),
    Part("a CNN with the same MACs", "cnn_baseline.py --match macs", 60),
    Part("fine-tuning, every mode", "finetune.py --mode all --epochs 3", 140),
    Part("a Swin, only its head", "finetune_swin.py --mode head", 15),
    Part("a Swin, all layers", "finetune_swin.py --layer-decay 0.7 --epochs 5", 30),
    Part("attention of the ViT", "attention_viz.py", 5),
    Part("the report", "report.py", 4),
    Part("predictions of the ViT", "predict.py", 5),
    Part("sharing the ViT", "share.py", 8),
]
SLOWDOWN = 4  # factor for cores without AVX-512; measured: 117 and 258 s for the first two parts
LOG, DONE = ROOT / "results" / "lab.log", ROOT / "results" / "lab.json"
_REPORT = "results/report.html"


def main() -> None:
    """Runs the parts that are not finished; results/lab.json remembers which are.

    Raises: UserError, if a part fails; SystemExit with 130, if it is interrupted.
    """
    DONE.parent.mkdir(exist_ok=True)
    done = _finished_parts()
    device = runtime.process_state().device
    has_avx512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
    slowdown = SLOWDOWN if device.type == "cpu" and not has_avx512 else 1
    minutes = slowdown * sum(part.seconds for part in PARTS) / 60
    print(f"The lab has {len(PARTS)} parts and takes about {minutes:.0f} minutes on two "
          f"CPU cores. Their output goes to {LOG.relative_to(ROOT)}")  # fmt: skip
    state, started = _fingerprint(), time.monotonic()
    for number, (title, command, seconds) in enumerate(PARTS, 1):
        print(f"{number}/{len(PARTS)}  {title:<24} python {command}  "
              f"(about {slowdown * seconds} s)", end="", flush=True)  # fmt: skip
        before = done.get(command, {})
        complete = all(Run(ROOT / folder).finished for folder in before.get("folders", []))
        # The report is always written again, because there may be more runs.
        if before.get("state") == state and complete and "report" not in command:
            print("  already finished")
            continue
        since = time.monotonic()
        folders = _run(title, command)
        done[command] = {"state": state, "folders": folders}
        checkpoints.write_json(DONE, done)
        accuracy = ""
        if len(folders) == 1:
            share = Run(ROOT / folders[0]).metrics().get("test_accuracy")
            accuracy = f"test accuracy {100 * share:.2f} %, " if share is not None else ""
        print(f"  {accuracy}{time.monotonic() - since:.0f} s")
    print(f"{time.monotonic() - started:.0f} s in total\n")
    results = ROOT / "results"
    found = comparisons.configurations(read_runs(results).runs)
    for sentence in sentences.summary(found):
        print("".join(char if char.isprintable() else "?" for char in sentence))
    print(f"Open {_REPORT}")


def _finished_parts() -> dict[str, Any]:
    try:
        return checkpoints.read_json(DONE)
    except UserError:  # missing or damaged: scripts themselves skip what is finished
        return {}


def _run(title: str, command: str) -> list[str]:
    """Runs a script to its end and returns the folders of its runs, relative to the project."""
    report = LOG.with_suffix(".folders")
    report.unlink(missing_ok=True)
    environment = {**os.environ, Run.FOLDERS_VARIABLE: str(report)}
    with open(LOG, "a+", encoding="utf-8", errors="replace") as log:
        start = log.seek(0, 2)
        log.write(f"\n=== {title}: python {command}\n")
        log.flush()
        words = [sys.executable, *command.split()]
        with subprocess.Popen(
            words, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, env=environment
        ) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # the script received it too
                print("\nstopping; the script saves its state", file=sys.stderr)
                process.wait()
                status = 130
        if status:
            log.seek(start)
            print("\n" + "\n".join(log.read().strip().splitlines()[-5:]))
            print(f"stopped in {title}; make lab, or python -m lab, resumes it", file=sys.stderr)
            raise SystemExit(status)
    found = report.read_text(encoding="utf-8").splitlines() if report.exists() else []
    report.unlink(missing_ok=True)
    return list(dict.fromkeys(found))


def _fingerprint() -> str:
    """A hash of everything that determines the results: scripts, packages and weights."""
    scripts = {ROOT / command.split()[0] for _, command, _ in PARTS}
    digest = blake2b(json.dumps(runtime.code_hashes(*sorted(scripts))).encode(), digest_size=8)
    for path in sorted((ROOT / "weights").glob("*.safetensors")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    # There are no flags; this prints the text above for --help and refuses everything else.
    argparse.ArgumentParser(
        "python -m lab", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    runtime.run_script(main)
