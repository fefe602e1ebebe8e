"""The report's numbers, from the records; what is broken is named and breaks nothing."""

import io
import json
import random
import shutil
from base64 import b64decode
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.metrics import accuracy_score, confusion_matrix
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests

import cnn_baseline
import finetune
import report
import train
from lab.core import constants
from lab.data.thumbnails import thumbnail
from lab.report.comparisons import chosen, configurations, hardest, pairs, twins
from lab.report.content import content
from lab.report.markdown import cell, fill, page
from lab.report.records import read_runs
from lab.training.results import over_seeds

SMALL = [
    "--embed-dim",
    "16",
    "--depth",
    "2",
    "--num-heads",
    "2",
    "--epochs",
    "2",
    "--precision",
    "fp32",
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Real runs: a ViT over two seeds and on a share, its twin over two seeds, modes of a ViT."""
    place = tmp_path_factory.mktemp("results")
    monkeypatch = pytest.MonkeyPatch()

    def run(script, where, *words, base=None, without=()):
        before = {s: dict(vars(s)) for s in (train, cnn_baseline, finetune)}
        argv = ["--results-dir", str(place / where), *words]
        monkeypatch.setattr("sys.argv", [f"{script.__name__}.py", *argv])  # for the records
        values = constants.override(script, argv, base, without)
        if script is finetune:
            finetune.run_all_or_one(values, plain_only=True)
        else:
            over_seeds(values, partial(train.train, build=script.build))
        for changed, was in before.items():
            vars(changed).update(was)

    run(train, "train", *SMALL, "--num-seeds", "2")
    run(train, "official/train", *SMALL)
    run(train, "train", *SMALL, "--train-fraction", "0.1")
    run(cnn_baseline, "cnn_baseline", *SMALL, "--num-seeds", "2", base=train,
        without=cnn_baseline.NOT_HERE)  # fmt: skip
    vit = ["--pretrained", str(place / "train" / "digits-vit_16x2-s0"), "--epochs", "1",
           "--precision", "fp32", "--data-dir", str(place.parent / "data")]  # fmt: skip
    for mode in ("head", "full", "scratch"):
        run(finetune, "finetune", *vit, "--mode", mode)
    monkeypatch.undo()
    return place


@pytest.fixture
def place(made, tmp_path):
    shutil.copytree(made, tmp_path / "results")
    return tmp_path / "results"


def by_name(shown, where=""):
    return {run["name"]: run for run in shown["runs"] if where in run["folder"]}


def predictions(place, run):
    with open(
        place.parent / Path(run["folder"]).relative_to(place.parent) / "predictions.csv"
    ) as file:
        rows = [line.rstrip("\n").split(",") for line in file][1:]
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_numbers_of_runs_are_those_of_their_predictions(place, tmp_path):
    shown = content(read_runs(place), place, tmp_path)
    assert len(shown["runs"]) == 9
    assert shown["left_out"] == []
    for run in shown["runs"]:
        _, label, guess, _ = predictions(place, run)
        assert run["accuracy"] == pytest.approx(accuracy_score(label, guess), abs=1e-6)
        theirs = confusion_matrix(label, guess)
        ours = np.zeros_like(theirs)
        for row, column, count in run["confusion"]:
            ours[row, column] = count
        assert (ours == theirs).all()
        gap = sum(n * abs(sure - right) for sure, right, n in run["calibration"]) / len(label)
        assert gap == pytest.approx(run["calibration_error"], abs=2e-4)  # confidences are rounded


def test_seeds_are_put_together_and_the_projects_own_runs_stay_apart(place, tmp_path):
    shown = content(read_runs(place), place, tmp_path)
    told = [
        (one["name"].partition("_")[0], one["task"], len(one["runs"])) for one in shown["seeds"]
    ]
    assert told == [("digits-vit", "From scratch", 2), ("digits-cnn", "CNN twin", 2)]
    for one in shown["seeds"]:
        accuracies = [shown["runs"][i]["accuracy"] for i in one["runs"]]
        assert one["mean"] == pytest.approx(np.mean(accuracies))
        assert one["deviation"] == pytest.approx(np.std(accuracies, ddof=1))
    assert [run["reference"] for run in shown["runs"]].count(True) == 1


def test_pairs_are_statsmodels(place):
    (runs,) = chosen(configurations(read_runs(place).runs, place), place)
    assert len(runs) == 5  # ViT, twin, three modes; not the run on a share
    assert not any("official" in run.folder.parts for run in runs)  # the reader's own is taken
    tested = pairs(runs)
    right = {r.folder: r.predictions.labels == r.predictions.predicted for r in runs}
    for pair in tested:
        a, b = right[pair.one.folder], right[pair.other.folder]
        cells = [[(a & b).sum(), (a & ~b).sum()], [(~a & b).sum(), (~a & ~b).sum()]]
        assert pair.p == pytest.approx(their_mcnemar(cells, exact=True).pvalue)
        better = pair.one if pair.only_one > pair.only_other else pair.other
        assert (f"{better.model} is better" in pair.says) == (pair.p_holm < 0.05)
    theirs = multipletests([pair.p for pair in tested], method="holm")[1]
    assert [pair.p_holm for pair in tested] == pytest.approx(theirs.tolist())


def test_the_hardest_images_are_those_that_most_get_wrong(place):
    (runs,) = chosen(configurations(read_runs(place).runs, place), place)
    wrong = sum((r.predictions.labels != r.predictions.predicted).astype(int) for r in runs)
    found = hardest(runs)
    assert [image["wrong"] for image in found] == sorted(wrong, reverse=True)[: len(found)]
    assert all(wrong[image["index"]] == image["wrong"] for image in found)


def test_shares_and_modes_are_put_in_order(place, tmp_path):
    shown = content(read_runs(place), place, tmp_path)
    (efficiency,) = shown["efficiency"]
    (series,) = efficiency["series"]
    assert [(p["fraction"], p["images"], p["seeds"]) for p in series["points"]] == [
        (0.1, 129, 1), (1.0, 1295, 2),
    ]  # fmt: skip
    (tuning,) = shown["finetuning"]
    assert {p["label"] for p in tuning["points"]} == {"head", "full", "scratch"}
    assert tuning["points"][0]["label"] == "head"  # fewest trained parameters


def test_a_twin_was_trained_in_the_same_way(place):
    """A record of before OPTIMIZER was a constant belongs to the runs that AdamW trained."""

    def pairs_left():
        return len(twins(configurations(read_runs(place).runs, place), place))

    before = pairs_left()
    assert before
    for path in (place / "cnn_baseline").rglob("config.json"):
        break_json(path.parent, path.name, lambda record: record["constants"].pop("OPTIMIZER"))
    assert pairs_left() == before
    for path in (place / "train").rglob("config.json"):
        change = {"OPTIMIZER": "muon"}
        break_json(path.parent, path.name, lambda r, c=change: r["constants"].update(c))
    assert pairs_left() == 0


def test_the_summary_names_the_model_that_validation_chooses(place, tmp_path):
    shown = content(read_runs(place), place, tmp_path)
    assert shown["summary"][0].startswith("9 finished runs")
    assert any("validation chooses" in sentence for sentence in shown["summary"])
    assert any("Welch's t-test" in sentence for sentence in shown["summary"])


def break_json(folder, name, change):
    path = folder / name
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def text(name, content):
    return lambda folder: (folder / name).write_text(content)


def entry(name, **change):
    return lambda folder: break_json(folder, name, lambda record: record.update(change))


def without(name):
    return lambda folder: (folder / name).unlink()


def replace(path, old, new):
    path.write_text(path.read_text().replace(old, new, 1))


HEAD = "image,label,prediction,confidence\n"
BREAKS = {  # what happens to a run's folder, and the reason that the report gives
    "not JSON": (text("config.json", "{"), "config.json cannot be read"),
    "binary": (lambda f: (f / "config.json").write_bytes(b"\xff\0"), "config.json cannot be read"),
    "a list": (text("metrics.json", "[]"), "metrics.json holds no object"),
    "deep": (text("metrics.json", "[" * 10**5), "metrics.json cannot be read"),
    "old": (entry("config.json", schema=0), "another version of the lab (schema 0, not 1)"),
    "no config": (without("config.json"), "config.json is missing beside best.safetensors"),
    "too good": (entry("metrics.json", test_accuracy=0.999), "one of them was changed"),
    "above one": (entry("metrics.json", val_accuracy=1.5), "metrics.json: val_accuracy is 1.5"),
    "no number": (entry("metrics.json", epochs="all"), "metrics.json: epochs is 'all'"),
    "no predictions": (without("predictions.csv"), "predictions.csv cannot be read"),
    "odd class": (text("predictions.csv", f"{HEAD}1,1,x,1\n"), "cannot be read (KeyError('x'))"),
    "no rows": (text("predictions.csv", HEAD), "predictions.csv cannot be read"),
    "short": (text("history.csv", "epoch,val_loss\n1,0.5\n"), "history.csv cannot be read"),
    "NaN": (lambda f: replace(f / "history.csv", "\n1,", "\nnan,"), "value that cannot be"),
    "below 0": (lambda f: replace(f / "history.csv", "\n1,", "\n-1,"), "value that cannot be"),
    "stopped": (without("metrics.json"), "stopped after epoch 2 of 2; it goes on with: python"),
}


@pytest.mark.parametrize("name", BREAKS)
def test_a_broken_run_is_named_with_the_reason_and_the_rest_is_shown(place, tmp_path, name):
    change, reason = BREAKS[name]
    change(place / "train" / "digits-vit_16x2-s1")
    found = read_runs(place)
    ((folder, why),) = found.left_out
    assert folder.name == "digits-vit_16x2-s1"
    assert reason in why
    shown = content(found, place, tmp_path)
    assert len([run for run in shown["runs"] if run["state"] == "finished"]) == 8
    assert cell(why) in page(shown, found, place)


def test_foreign_and_empty_folders_are_named(place):
    (place / "train" / "notes").mkdir()
    (place / "train" / "notes" / "ideas.txt").write_text("more data")
    (place / "train" / "nothing").mkdir()
    (place / ".hidden").mkdir()
    reasons = {folder.name: why for folder, why in read_runs(place).left_out}
    assert reasons == {"notes": "no run's records; it holds ideas.txt", "nothing": "it is empty"}


@pytest.mark.parametrize("seed", range(30))
def test_no_damage_breaks_the_report(place, tmp_path, seed):
    """Bytes of records changed, cut and doubled at random."""
    rng = random.Random(seed)
    files = sorted([*place.rglob("*.json"), *place.rglob("*.csv")])
    for path in rng.sample(files, 4):
        held = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 4)):
            at = rng.randrange(len(held))
            held[at : at + rng.choice([0, 1, 1, 40])] = rng.choice(
                [
                    b"",
                    b"\0",
                    b"null",
                    b'"',
                    b"-1",
                    b"[",
                    b"9e999",
                    b"\xff",
                    bytes(held[at : at + 30]),
                ]
            )
        path.write_bytes(bytes(held))
    reported(place, tmp_path)


def reported(place, tmp_path):
    found = read_runs(place)
    shown = content(found, place, tmp_path)
    json.dumps(shown, allow_nan=False)
    page(shown, found, place)
    assert len(found.runs) + len(found.left_out) >= 9


STRANGE = [None, [], {}, "x", -1, 1e308, True, [None], {"a": []}]


@pytest.mark.parametrize("seed", range(60))
def test_no_strange_value_breaks_the_report(place, tmp_path, seed):
    """Entries of JSON records replaced at random by values of other types."""
    rng = random.Random(seed)
    for path in rng.sample(sorted(place.rglob("*.json")), 3):
        record = json.loads(path.read_text())
        holder, key = record, rng.choice(list(record))
        while isinstance(holder[key], dict) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            key = rng.choice(list(holder))
        holder[key] = rng.choice(STRANGE)
        path.write_text(json.dumps(record))
    reported(place, tmp_path)


@pytest.mark.parametrize("value", STRANGE, ids=repr)
def test_no_strange_constant_keeps_runs_from_being_read(place, value):
    """Each constant of a fine-tuning run in turn: its label is put together from them."""
    path = next((place / "finetune").rglob("config.json"))
    record = json.loads(path.read_text())
    for name in record["constants"]:
        changed = {**record, "constants": {**record["constants"], name: value}}
        path.write_text(json.dumps(changed))
        found = read_runs(place)
        assert len(found.runs) + len(found.left_out) >= 9, name


def test_tables_hold_what_users_write(place, tmp_path):
    """A class called `a|b`, a folder with brackets: the table keeps its columns."""
    odd = place / "train" / "a|b [x] (y) `z`"
    (place / "train" / "digits-vit_16x2-s0").rename(odd)
    found = read_runs(place)
    text = page(content(found, place, tmp_path), found, place)
    (line,) = [row for row in text.splitlines() if row.startswith("| [a")]
    assert line.replace("\\|", "").count("|") == 9
    assert "](train/a%7Cb%20%5Bx%5D%20%28y%29%20%60z%60/)" in line


def test_markers_are_filled_and_unknown_ones_refused(place):
    text = "before\n<!-- results: seeds -->\nold\n<!-- end of results -->\nafter\n"
    found = read_runs(place)
    filled = fill(text, found, place, place.parent)
    assert filled.startswith("before\n<!-- results: seeds -->\n| model |")
    assert filled.endswith("<!-- end of results -->\nafter\n")
    assert "old" not in filled
    assert fill(filled, found, place, place.parent) == filled
    with pytest.raises(report.UserError, match="no table is called 'sed'"):
        fill(text.replace("seeds", "sed"), found, place, place.parent)


def test_thumbnails_are_the_images_and_open_nothing_else(tmp_path):
    uri = thumbnail("digits", "1713", tmp_path)
    pixels = np.asarray(Image.open(io.BytesIO(b64decode(uri.partition(",")[2]))))
    assert (pixels == np.rint(load_digits().images[1713] * 255 / 16)).all()
    Image.new("RGB", (300, 200), "red").save(tmp_path / "secret.jpg")
    (tmp_path / "mine").mkdir()
    Image.new("RGB", (300, 200), "red").save(tmp_path / "mine" / "ok.jpg")
    opened = thumbnail(str(tmp_path / "mine"), "ok.jpg", tmp_path)
    assert Image.open(io.BytesIO(b64decode(opened.partition(",")[2]))).size == (96, 64)
    assert thumbnail(str(tmp_path / "mine"), "../secret.jpg", tmp_path) is None
    assert thumbnail("cifar10", "test/3", tmp_path) is None  # nothing is downloaded
    assert thumbnail("digits", "99999", tmp_path) is None
    assert thumbnail("digits", "many", tmp_path) is None


def test_a_place_without_runs_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", ["report.py", "--results", str(tmp_path / "nowhere")])
    with pytest.raises(report.UserError, match="train something first"):
        report.main()
