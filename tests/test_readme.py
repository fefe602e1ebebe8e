"""The README says what the records and the tree say."""

import re
from pathlib import Path

import report
from lab.report.records import read_runs

ROOT = Path(__file__).resolve().parents[1]
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
    scores = {look.folder for look in found.looks if "methods" in look.metrics()}
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
    assert [number for number in quoted if number not in records] == []


def test_readme_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 200
    for path, text in ((ROOT / "README.md", README), (OFFICIAL / "README.md", TABLES)):
        targets = re.findall(r"\]\(([^)#:\s]+)(?:#[\w-]+)?\)", text)
        assert [t for t in targets if not (path.parent / t).exists()] == []


def test_records_name_no_machine_and_no_path_of_it():
    for path in OFFICIAL.rglob("metrics.json"):
        text = (path.parent / "config.json").read_text(encoding="utf-8")
        assert not re.search(r'"/|/home/|/root/|/tmp/', text), path
