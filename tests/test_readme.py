"""The README says what the records and the tree say."""

import json
import re
import statistics
from pathlib import Path

import pytest

from lab.attention_score import CENTRE, RANDOM, candidates
from lab.score_tables import percent, points

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
OFFICIAL = ROOT / "results" / "official"
RUNS = sorted(path for path in OFFICIAL.rglob("metrics.json")
              if path.parent.parent.name != "attention_viz")  # fmt: skip
SCORES = sorted((OFFICIAL / "attention_viz").glob("*-score/metrics.json"))


def row(path):
    """A run's line in the table of results, made from its records."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    config = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))
    folder = path.parent.relative_to(ROOT).as_posix()
    low, high = (100 * share for share in metrics["test_accuracy_95"])
    tuned = "pretrained" in config  # a fine-tuned model says how much of it was trained
    parameters = config["model"]["trainable_parameters" if tuned else "parameters"]
    memory = f" {metrics['peak_memory_mb']:,} MB |" if tuned else ""
    return (
        f"| [{path.parent.name}]({folder}/) | {parameters:,} "
        f"| {metrics['epochs']} | **{100 * metrics['test_accuracy']:.2f} %** ({low:.1f} to "
        f"{high:.1f}, {metrics['test_images']:,} images) | {metrics['training_seconds']:,.0f} s |"
        f"{memory}"
    )


def score_row(path):
    """A line in the table of attention maps: the map that validation finds best, on the test."""
    record = json.loads(path.read_text(encoding="utf-8"))
    methods = record["methods"]
    name = max(candidates(record), key=lambda name: methods[name]["validation"])
    found = methods[name]["trained"]
    return (
        f"| [{record['title']}]({path.parent.relative_to(ROOT).as_posix()}/) | {name} "
        f"| {percent(found['average_precision']['mean'])} "
        f"| {points(found['average_precision'][CENTRE])} "
        f"| {points(found['average_precision'][RANDOM])} | {percent(found['iou']['mean'])} |"
    )


@pytest.mark.parametrize("path", SCORES, ids=lambda path: path.parent.name)
def test_scores_of_maps_are_those_of_the_records(path):
    assert score_row(path) in README


@pytest.mark.parametrize("path", RUNS, ids=lambda path: path.parent.name)
def test_results_are_those_of_the_records(path):
    assert row(path) in README


def test_every_quoted_run_has_records():
    quoted = re.findall(r"\]\((results/official/[^)]+)/\) \|", README)
    assert {(ROOT / folder / "metrics.json") for folder in quoted} == {*RUNS, *SCORES}
    assert RUNS


def test_mean_over_seeds_is_that_of_the_records():
    runs = [p for p in RUNS if p.parent.name.startswith("digits-vit_64x4")]
    metrics = [json.loads(path.read_text(encoding="utf-8")) for path in runs]
    accuracies = [100 * m["test_accuracy"] for m in metrics]
    mean, deviation = statistics.mean(accuracies), statistics.stdev(accuracies)
    slowest = max(m["training_seconds"] for m in metrics)
    said = f"mean {mean:.2f} %, deviation {deviation:.2f} points, at most {slowest:.0f} s"
    assert said in README


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
