"""The README says what the records and the tree say."""

import re
from pathlib import Path

import report
from lab.report.records import read_runs

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OFFICIAL = ROOT / "results" / "official"


def test_tables_are_those_of_the_records():
    """`python report.py --readme` writes them; whoever changes a record or a table runs it."""
    assert report.readme() == README


def test_every_official_run_is_whole_and_quoted():
    found = read_runs(OFFICIAL)
    assert found.left_out == []
    quoted = {Path(target) for target in re.findall(r"\]\((results/official/[^)]+)/\)", README)}
    runs = {run.folder.relative_to(ROOT) for run in found.runs if run.share == 1 and not run.sweep}
    scores = {look.folder.relative_to(ROOT) for look in found.looks if "methods" in look.metrics()}
    assert runs
    assert runs <= quoted
    assert {folder for folder in scores if folder.name.endswith("-score")} <= quoted


def test_figures_of_speed_are_those_of_the_records():
    """Rows with figures, and every share and ratio in bold, stand in a record of benchmarks/."""
    folder = ROOT / "benchmarks"
    records = "\n".join(p.read_text(encoding="utf-8") for p in (folder / "results").rglob("*.md"))
    text = (folder / "README.md").read_text(encoding="utf-8")
    text += README[README.index("## Speed") : README.index("## What is where")]
    lines = [line for line in text.splitlines() if line.startswith("|")]
    rows = [line for line in lines if re.search(r"\d\.\d", line)]
    assert rows
    assert [row for row in rows if row not in records] == []
    quoted = re.findall(r"\*\*([\d.]+)\*\*", text)
    assert [figure for figure in quoted if figure not in records] == []


def test_every_module_is_in_the_tree():
    files = [*ROOT.glob("*.py"), *(ROOT / "lab").glob("*.py")]
    missing = [f.name for f in files if f.name != "__init__.py" and f"{f.name} " not in README]
    assert missing == []
    tree = README[README.index("## What is where") :]
    named = re.findall(r"^ {2}(\w+\.py) ", tree, re.M)
    assert all((ROOT / "lab" / name).exists() for name in named)


def test_records_name_no_machine_and_no_path_of_it():
    for path in OFFICIAL.rglob("metrics.json"):
        text = (path.parent / "config.json").read_text(encoding="utf-8")
        assert not re.search(r'"/|/home/|/root/|/tmp/', text), path
