"""Disturbs, damages and attacks the project on purpose, and counts what it survives.

    python -m tests.drills                         # every drill 20 times, half an hour on one core
    python -m tests.drills --seed 1 --attempts 100 kill hostile_images

An attempt is survived if the project finishes, or ends with a sentence and the same command then
gives the result of an undisturbed run, bit by bit. The same seed repeats the same attempts.
"""

import argparse
import random
import sys
import tempfile
import time
from pathlib import Path

from tqdm import tqdm

from tests.drills import DRILLS
from tests.drills.harness import Attempt, Lost


def attempt(name: str, seed: int, number: int) -> str | None:
    """Makes one attempt. Returns: None if it was survived, else what happened."""
    with tempfile.TemporaryDirectory(prefix="drill-", ignore_cleanup_errors=True) as folder:
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
