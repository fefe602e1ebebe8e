"""README.md and results/official/README.md agree with the records."""

import re
import subprocess
from pathlib import Path

import report
from lab.report import read_runs

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OFFICIAL = ROOT / "results" / "official"
TABLES = (OFFICIAL / "README.md").read_text(encoding="utf-8")


def test_tables_equal_the_records():
    """`python report.py --official` writes them; run it after changing a record or a table."""
    for path, text in report.official_pages().items():
        assert text == path.read_text(encoding="utf-8"), path


def test_every_official_run_is_complete_and_listed():
    found = read_runs(OFFICIAL)
    assert found.left_out == []
    listed = {OFFICIAL / target for target in re.findall(r"\]\(([\w./-]+)/\)", TABLES)}
    runs = {run.folder for run in found.runs if run.share == 1 and not run.sweep}
    scores = {run.folder for run in found.attention_runs if "methods" in run.metrics()}
    assert runs
    assert runs <= listed
    assert {folder for folder in scores if folder.name.endswith("-score")} <= listed


def test_speeds_equal_the_records():
    """Every row with numbers and every bold number of benchmarks/README.md is in a record."""
    folder = ROOT / "benchmarks"
    records = "\n".join(p.read_text(encoding="utf-8") for p in (folder / "results").rglob("*.md"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    rows = [line for line in text.splitlines() if re.match(r"\|.*\d\.\d", line)]
    assert rows
    assert [row for row in rows if row not in records] == []
    quoted = re.findall(r"\*\*([\d.]+)\*\*", text)
    found = set(re.findall(r"\d+\.\d+|\d+", records))
    assert [number for number in quoted if number not in found] == []


def test_readme_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 200
    for path, text in ((ROOT / "README.md", README), (OFFICIAL / "README.md", TABLES)):
        targets = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text)
        assert [t for t in targets if not (path.parent / t).exists()] == []


def test_official_results_are_small_and_git_ignores_other_runs():
    """A clone stays small, and running the lab leaves `git status` clean."""
    files = [path for path in OFFICIAL.rglob("*") if path.is_file()]
    ignored = _ignored(files)
    committed = [path for path in files if path not in ignored]
    assert sum(path.stat().st_size for path in committed) <= 14e6
    shown = [path.name for path in committed if path.suffix in (".png", ".jpg")]
    assert {"curves.png", "confusion.png"}.isdisjoint(shown)
    names = ("report.html", "README.md", "lab.log", "train/run/config.json", "sweep/s/x.png")
    own = [ROOT / "results" / name for name in names]
    names = ("weights.safetensors", "last.pt", "curves.png", "tensorboard/events")
    large = [OFFICIAL / "train" / "run" / name for name in names]
    kept = OFFICIAL / "train" / "run" / "metrics.json"
    assert _ignored([*own, *large, kept]) == {*own, *large}


def _ignored(paths):
    """The files that git would ignore if they were not tracked yet."""
    command = ["git", "check-ignore", "--stdin", "-z", "--no-index"]
    text = "\0".join(map(str, paths))
    done = subprocess.run(command, cwd=ROOT, input=text, capture_output=True, text=True)
    assert done.returncode < 2, done.stderr
    return {Path(name) for name in done.stdout.split("\0") if name}


def test_official_records_contain_no_absolute_paths():
    for path in OFFICIAL.rglob("metrics.json"):
        text = (path.parent / "config.json").read_text(encoding="utf-8")
        assert not re.search(r'"/|/home/|/root/|/tmp/', text), path
