"""Disturbs, damages and attacks the project on purpose, and counts what it survives.

    python -m tests.drills                         # every drill 20 times, half an hour on one core
    python -m tests.drills --seed 1 --attempts 100 kill hostile_images

An attempt is survived if the project finishes, or ends with a sentence. After a disturbed run, the
same command must then give the result of an undisturbed run, bit by bit (with --overwrite if the
run was damaged). The same seed repeats the same attempts.
"""

import argparse
import os
import random
import sys
import tempfile
import time
from pathlib import Path
from unittest import mock

import torch
from huggingface_hub import constants as hub
from tqdm import tqdm

from tests.drills import DRILLS
from tests.drills.harness import Attempt, Lost


def attempt(name: str, seed: int, number: int) -> str | None:
    """Makes one attempt. Returns: None if it was survived, else what happened."""
    with (
        mock.patch.dict(os.environ, HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1"),
        mock.patch.object(hub, "HF_HUB_OFFLINE", True),  # it was read from there at import
        tempfile.TemporaryDirectory(prefix="drill-", ignore_cleanup_errors=True) as folder,
    ):
        try:
            draw = random.Random(f"{name} {seed} {number}")
            return DRILLS[name](Attempt(draw, Path(folder)))
        except Lost as lost:
            return str(lost)


def main() -> None:
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser("python -m tests.drills", None, __doc__, formatter_class=plain)
    parser.add_argument("drills", nargs="*", metavar="DRILL", help=f"of {', '.join(DRILLS)}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--attempts", type=int, default=20, help="of each drill")
    c = parser.parse_args()
    if unknown := set(c.drills) - DRILLS.keys():
        parser.error(f"there are no drills {', '.join(sorted(unknown))}")
    torch.set_num_threads(1)  # forked processes must not wait for threads that they lack
    rows, losses, started = [], [], time.monotonic()
    for name in c.drills or DRILLS:
        numbers = tqdm(range(c.attempts), desc=name, leave=False, disable=None)
        lost = [(n, what) for n in numbers if (what := attempt(name, c.seed, n))]
        losses += [f"{name}, attempt {n}: {what}" for n, what in lost]
        rows.append((name.replace("_", " "), c.attempts, c.attempts - len(lost), len(lost)))
        print(f"{name}: {c.attempts - len(lost)} of {c.attempts} survived", file=sys.stderr)
    print("\n".join(["| drill | attempts | survived | lost |", "|---|---|---|---|"]))
    print("\n".join(f"| {' | '.join(map(str, row))} |" for row in rows))
    print(f"\nseed {c.seed}, {time.monotonic() - started:.0f} s", *losses, sep="\n")
    sys.exit(bool(losses))


if __name__ == "__main__":
    main()
