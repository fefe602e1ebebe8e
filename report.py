"""Every run side by side: results/report.html, one page to open, and results/README.md.

    python report.py                                   # all runs below results/
    python report.py --results my/results              # those of another folder
    python report.py --official                        # the project's own tables

The page needs no network and no server. Folders that hold no run, or a broken one, are listed in
it with the reason.
"""

import sys
from pathlib import Path
from types import SimpleNamespace

from lab.core import UserError, checkpoints, constants, run_script
from lab.report.content import content
from lab.report.markdown import fill, page
from lab.report.page import write_page
from lab.report.records import read_runs

# --- What is reported ---
RESULTS: str = "results"  # the folder of all runs
DATA_DIR: str = "data"  # where downloads lie, for pictures of test images; nothing is downloaded
OFFICIAL: bool = False  # instead: the tables of README.md and results/official/README.md

ROOT = Path(__file__).resolve().parent
OFFICIAL_RUNS = ROOT / "results" / "official"  # the runs that README.md quotes


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    place = Path(c.RESULTS)
    if c.OFFICIAL:
        for path, text in official_pages().items():
            write_text(path, text)
            print(path)
        return
    if not place.is_dir():
        raise UserError(f"there is no folder {place}: train something first, with python train.py")
    found = read_runs(place)
    shown = content(found, place, Path(c.DATA_DIR))
    write_page(place / "report.html", shown)
    write_text(place / "README.md", page(shown, found, place))
    print("\n".join(shown["summary"]))
    for folder, why in found.left_out:
        print(f"{folder}: {why}")
    print(f"{place / 'README.md'}\n{place / 'report.html'}")


def official_pages() -> dict[Path, str]:
    """README.md and results/official/README.md, with their tables generated from the records."""
    found = read_runs(OFFICIAL_RUNS)
    pages = (ROOT / "README.md", OFFICIAL_RUNS / "README.md")
    return {
        path: fill(path.read_text(encoding="utf-8"), found, OFFICIAL_RUNS.parent, path.parent)
        for path in pages
    }


def write_text(path: Path, text: str) -> None:
    checkpoints.write_atomically(
        path, lambda scratch: scratch.write_bytes(text.encode("utf-8", "replace"))
    )


if __name__ == "__main__":
    run_script(main)
