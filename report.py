"""Write one page about all your runs, results/report.html.

    python report.py                                   # all runs below results/
    python report.py --results my/results              # all runs below another folder
    python report.py --hand-in                         # also a zip with everything for the teacher
    python report.py --official                        # the project's own page and tables

The page needs neither a network nor a server. The tables are also written as text, to README.md in
the same folder. Folders whose records are damaged or incomplete are listed with the reason.
"""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

from lab.core import UserError, checkpoints, constants, runtime
from lab.report import build_content, hand_in, markdown, read_runs, write_page

# --- What to report on ---
RESULTS: str = "results"  # folder that contains the runs
DATA_DIR: str = "data"  # folder of downloaded datasets, for thumbnails; nothing is downloaded
HAND_IN: bool = False  # also write hand-in.zip for the teacher: records, code, missing items
OFFICIAL: bool = False  # write the page and tables in results/official and README.md instead

_ROOT = Path(__file__).resolve().parent
_OFFICIAL = _ROOT / "results" / "official"  # the runs that come with the project


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if c.HAND_IN and c.OFFICIAL:
        raise UserError("--hand-in is for your own runs: use it without --official")
    place = Path(os.path.relpath(_OFFICIAL)) if c.OFFICIAL else Path(c.RESULTS)
    if not place.is_dir():
        raise UserError(f"there is no folder {place}: train a model first, with python train.py")
    if (place / "config.json").exists():
        parent = place.parent if place.name else place.resolve().parent
        raise UserError(
            f"{place} is a single run. Pass a folder of runs, for example --results {parent}"
        )
    if not c.OFFICIAL:
        _check_readme(place / "README.md")
    found = read_runs(place)
    title = "Official results" if c.OFFICIAL else "My runs"
    content = build_content(found, Path(c.DATA_DIR), title)
    write_page(place / "report.html", content)
    if c.OFFICIAL:
        for path, text in official_pages().items():
            _write(path, text)
    else:
        _write(place / "README.md", markdown.results_page(content, found))
    for line in content["summary"]:
        print(_printable(line))
    for folder, reason in found.left_out:
        print(_printable(f"Note: {folder} is not in the report: {reason}"))
    print(place / "README.md", place / "report.html", sep="\n")
    if c.HAND_IN:
        path, content = hand_in.write_hand_in(found)
        lines = [*hand_in.missing(content), *hand_in.mismatched(content)]
        print(*map(_printable, lines), path, sep="\n")


def _check_readme(path: Path) -> None:
    """Raises: UserError, if the report would replace a README.md that it has not written."""
    if path.parent.resolve() == _OFFICIAL:
        raise UserError(f"{path.parent} contains the project's own runs: use --official")
    if path.exists() and markdown.WRITTEN_BY not in path.read_text("utf-8", errors="replace"):
        raise UserError(
            f"{path} would be replaced, but report.py has not written it: move it, or pass another "
            "folder of runs as --results"
        )


def official_pages() -> dict[Path, str]:
    """README.md and results/official/README.md with tables generated from the official records."""
    found = read_runs(_OFFICIAL)
    return {
        path: markdown.fill(path.read_text(encoding="utf-8"), found, path.parent)
        for path in (_ROOT / "README.md", _OFFICIAL / "README.md")
    }


def _write(path: Path, text: str) -> None:
    encoded = text.encode("utf-8", errors="replace")
    checkpoints.write_atomically(path, lambda scratch: scratch.write_bytes(encoded))


def _printable(text: str) -> str:
    """Text without control characters and invalid Unicode; records may come from anybody."""
    return "".join(char if char.isprintable() else "?" for char in text)


if __name__ == "__main__":
    runtime.run_script(main)
