"""The whole lab on the embedded data, offline: `make lab`, or `python -m lab`.

One line a part; what the parts print goes to results/lab.log. A part that is done is not done
again unless code or weights have changed since, and one that was stopped goes on, as every script
does by itself.
"""

import hashlib
import json
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PARTS = {  # fewer epochs than the scripts' own where those would take longer than ten minutes
    "a ViT from scratch": "train.py",
    "a CNN of the same size": "cnn_baseline.py",
    "fine-tuning, every mode": "finetune.py --mode all --epochs 5",
    "a Swin, head alone": "finetune_swin.py --mode head",
    "a Swin, all of it": "finetune_swin.py --layer-decay 0.7 --epochs 5",
    "where the ViT looks": "attention_viz.py",
    "the report": "report.py",
}
LOG, DONE = ROOT / "results" / "lab.log", ROOT / "results" / "lab.json"


def main() -> None:
    DONE.parent.mkdir(exist_ok=True)
    done = json.loads(DONE.read_text()) if DONE.exists() else {}
    print(f"the lab, {len(PARTS)} parts; what they print is in {LOG.relative_to(ROOT)}")
    code, started, outcome = fingerprint(), time.monotonic(), ""
    for number, (title, words) in enumerate(PARTS.items(), 1):
        print(f"{number}/{len(PARTS)}  {title:<24} python {words}", end="", flush=True)
        before = done.get(words, {})
        # The report is always made anew: there may be more runs by now.
        if (
            before.get("code") == code
            and Path(ROOT, before["made"]).exists()
            and "report" not in words
        ):
            print("  done before")
            continue
        since = time.monotonic()
        output = run(title, words)
        outcome = output.splitlines()[-1]
        done[words] = {"code": code, "made": outcome}
        DONE.write_text(json.dumps(done, indent=2) + "\n")
        told = re.findall(r"test accuracy (\d+\.\d+ %)", output)
        print(f"  {told[0] + ', ' if len(told) == 1 else ''}{time.monotonic() - since:.0f} s")
    print(f"{time.monotonic() - started:.0f} s in all. Open {outcome}")


def run(title: str, words: str) -> str:
    """Runs a script to its end and returns what it printed, which the log has too.

    Raises: SystemExit, for a script that failed or was stopped; the same command goes on there.
    """
    command = [sys.executable, *words.split()]
    with open(LOG, "a+", encoding="utf-8", errors="replace") as log:
        start = log.seek(0, 2)
        log.write(f"\n=== {title}: python {words}\n")
        log.flush()
        with subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT) as process:
            try:
                status = process.wait()
            except KeyboardInterrupt:  # the script got it too, and saves itself
                process.wait()
                status = 130
        log.seek(start)
        output = log.read().strip()
    if status:
        print("\n" + "\n".join(output.splitlines()[-5:]))
        print(f"stopped in {title}: make lab, or python -m lab, goes on there", file=sys.stderr)
        raise SystemExit(status)
    return output


def fingerprint() -> str:
    """Of all that decides what the parts do: the scripts, the lab, the weights."""
    digest = hashlib.blake2b(digest_size=8)
    files = [*ROOT.glob("*.py"), *ROOT.glob("lab/*"), *ROOT.glob("weights/*")]
    for path in sorted(path for path in files if path.is_file()):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


if __name__ == "__main__":
    main()
