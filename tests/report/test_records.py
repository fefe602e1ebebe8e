"""Damaged records are listed with the reason, and everything else is shown."""

import json
import os
import random
import shutil
from pathlib import Path

import pytest

from lab.report import Record, build_content, markdown, read_runs
from lab.report.page import write_page
from tests.report.json_files import change_json

HEAD = "image,label,prediction,confidence\n"
RUN = "digits-vit_16x2-s1"


def write(name, content):
    return lambda run: (run / name).write_text(content)


def update(name, **entries):
    return lambda run: change_json(run / name, lambda record: record.update(entries))


def remove(name):
    return lambda run: (run / name).unlink()


def replace(name, old, new):
    def damage(run):
        text = (run / name).read_text()
        assert old in text
        (run / name).write_text(text.replace(old, new, 1))

    return damage


def pipe(name):
    def damage(run):
        (run / name).unlink()
        os.mkfifo(run / name)

    return damage


DAMAGE = {  # what happens to a run's folder, and the reason that the report gives
    "not JSON": (write("config.json", "{"), "config.json cannot be read"),
    "empty": (write("metrics.json", ""), "metrics.json cannot be read"),
    "binary": (lambda run: (run / "config.json").write_bytes(b"\xff"), "is not UTF-8 text"),
    "list": (write("metrics.json", "[]"), "metrics.json does not contain an object"),
    "nested": (write("metrics.json", "[" * 10**5), "metrics.json cannot be read"),
    "old": (update("config.json", schema=0), "another version of the lab (schema 0, not 1)"),
    "no config": (remove("config.json"), "config.json is missing, but best.safetensors is there"),
    "no constants": (update("config.json", constants=None),
                     "config.json: constants is None, which is not an object"),
    "model": (replace("config.json", '"MODEL": "vit"', '"MODEL": ["vit"]'),
              "config.json: MODEL is ['vit'], which is not text"),
    "accuracy": (update("metrics.json", test_accuracy=0.999), "one of the files was changed"),
    "above 1": (update("metrics.json", val_accuracy=1.5),
                "metrics.json: val_accuracy is 1.5, which is not a number from 0 to 1"),
    "text": (update("metrics.json", epochs="all"), "epochs is 'all', which is not a count"),
    "NaN": (update("metrics.json", val_accuracy=float("nan")), "NaN is not a finite number"),
    "infinite": (replace("metrics.json", '"epochs": 2', '"epochs": 1e999'),
                 "1e999 is not a finite number"),
    "10^400": (update("metrics.json", epochs=10**400), "is not a finite number"),
    "10^30": (update("metrics.json", epochs=10**30), "which is not a count"),
    "NUL": (replace("metrics.json", "{", "{\0"), "metrics.json contains NUL bytes"),
    "NUL in CSV": (replace("history.csv", "\n1", "\n\0"), "history.csv contains NUL bytes"),
    "no predictions": (remove("predictions.csv"), "predictions.csv is missing"),
    "class": (write("predictions.csv", f"{HEAD}1,1,x,1\n"), "has the unknown class 'x'"),
    "no rows": (write("predictions.csv", HEAD), "predictions.csv cannot be read"),
    "columns": (write("predictions.csv", "a,b\n"), "predictions.csv has unexpected columns: a, b"),
    "curve": (write("history.csv", "epoch,val_loss\n1,0.5\n"), "has no column 'train_loss'"),
    "NaN epoch": (replace("history.csv", "\n1,", "\nnan,"), "epoch is nan"),
    "epoch -1": (replace("history.csv", "\n1,", "\n-1,"), "history.csv: epoch is -1.0"),
    "no history": (remove("history.csv"), "history.csv lacks the best epoch of metrics.json"),
    "stopped": (remove("metrics.json"), "stopped after epoch 2 of 2; resume it with: python"),
    "threads": (update("config.json", hardware={"threads": "2"}),
                "config.json: hardware.threads is '2', which is not a count or null"),
    "pipe": (pipe("metrics.json"), "metrics.json is not a regular file"),
    "config pipe": (pipe("config.json"), "config.json is not a regular file"),
}  # fmt: skip


def report_on(place, tmp_path):
    """Writes the whole report. Returns what was found, the content and the tables."""
    found = read_runs(place)
    content = build_content(found, tmp_path)
    write_page(tmp_path / "report.html", content)
    return found, content, markdown.results_page(content, found)


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_run_is_listed_and_the_others_are_shown(place, tmp_path, name):
    damage, reason = DAMAGE[name]
    damage(place / "train" / RUN)
    found, content, page = report_on(place, tmp_path)
    ((folder, listed),) = found.left_out
    assert folder.name == RUN
    assert reason in listed
    assert len(listed) < 300
    assert len([run for run in content["runs"] if run["state"] == "finished"]) == 8
    assert markdown.escape(listed) in page


@pytest.mark.parametrize("command", ["torchrun --standalone --nproc-per-node 2 train.py --seed 1",
                                     "accelerate launch train.py", "python train.py"])  # fmt: skip
def test_script_is_found_after_a_launcher(command):
    record = Record(Path("run"), {"command": command}, [], None, None, None)
    assert (record.script, record.task) == ("train.py", "From scratch")


@pytest.mark.parametrize("name", ["config.json", "metrics.json"])
def test_times_next_to_other_programs_are_left_out(place, tmp_path, name):
    change_json(place / "train" / RUN / name, lambda record: record.update(load=64.0))
    _, content, page = report_on(place, tmp_path)
    assert {run["name"] for run in content["runs"] if run["seconds"] is None} == {RUN}
    (line,) = (line for line in page.splitlines() if f"[{RUN}](train/" in line)
    (other,) = (line for line in page.splitlines() if "[digits-vit_16x2-s0](train/" in line)
    assert "|  |  |" in line
    assert " s |" in other


def test_folders_without_runs_are_listed(place):
    (place / "train" / "notes").mkdir()
    (place / "train" / "notes" / "ideas.txt").write_text("more data")
    (place / "train" / "nothing").mkdir()
    (place / ".hidden").mkdir()
    reasons = {folder.name: reason for folder, reason in read_runs(place).left_out}
    assert reasons == {"notes": "contains no run, only ideas.txt", "nothing": "is empty"}


def test_damaged_attention_scores_are_listed(place, tmp_path):
    run = place / "attention_viz" / "a"
    run.mkdir(parents=True)
    config = {"schema": 1, "command": "python attention_viz.py", "dataset": {"name": "pets"}}
    (run / "config.json").write_text(json.dumps(config))
    scores = {"title": "a", "animal_share": 0.4, "methods": {"rollout": {"validation": 1}}}
    (run / "metrics.json").write_text(json.dumps(scores))
    found, *_ = report_on(place, tmp_path)
    ((_, reason),) = found.left_out
    assert reason == "metrics.json does not contain scores (KeyError('trained'))"


def test_the_command_that_resumes_does_not_start_over(place):
    remove("metrics.json")(place / "train" / RUN)
    path = place / "train" / RUN / "config.json"
    change_json(path, lambda record: record.update(command=record["command"] + " --overwrite"))
    ((_, reason),) = read_runs(place).left_out
    assert "resume it with: python" in reason
    assert "--overwrite" not in reason


def test_damaged_sweeps_are_listed(place, tmp_path):
    sweep = place / "sweep" / "a"
    sweep.mkdir(parents=True)
    trial = {"number": 0, "state": "complete", "params": {}, "folder": 5}
    (sweep / "sweep.json").write_text(json.dumps({"says": "", "best": 0, "trials": [trial]}))
    (place / "train" / RUN).rename(sweep / "000")
    found, *_ = report_on(place, tmp_path)
    assert not any(sweep in run.folder.parents for run in found.runs)
    ((_, reason),) = found.left_out
    assert reason == "sweep.json: trials[0].folder is 5, which is not text or null"


@pytest.mark.parametrize("seed", range(30))
def test_random_bytes_never_break_the_report(place, tmp_path, seed):
    rng = random.Random(seed)
    files = sorted([*place.rglob("*.json"), *place.rglob("*.csv")])
    for path in rng.sample(files, 4):
        data = bytearray(path.read_bytes())
        for _ in range(rng.randint(1, 4)):
            start = rng.randrange(len(data))
            copy = bytes(data[start : start + 30])
            pieces = [b"", b"\0", b"null", b'"', b"-1", b"[", b"9e999", b"\xff", b"NaN", copy]
            data[start : start + rng.choice([0, 1, 1, 40])] = rng.choice(pieces)
        path.write_bytes(bytes(data))
    found, *_ = report_on(place, tmp_path)
    assert len(found.runs) + len(found.left_out) >= 9


STRANGE = [None, [], {}, "x", "", "\0", "\ud800", -1, 0, 1e308, 10**400, float("nan"),
           float("-inf"), True, [None], {"a": []}]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_strange_values_never_break_the_report(place, tmp_path, seed):
    rng = random.Random(seed)
    for path in rng.sample(sorted(place.rglob("*.json")), 3):
        record = json.loads(path.read_text())
        holder, key = record, rng.choice(list(record))
        while isinstance(holder[key], dict) and holder[key] and rng.random() < 0.7:
            holder = holder[key]
            key = rng.choice(list(holder))
        holder[key] = rng.choice(STRANGE)
        path.write_text(json.dumps(record))
    found, *_ = report_on(place, tmp_path)
    assert len(found.runs) + len(found.left_out) >= 9


VALUES = [None, [], {"a": []}, "\ud800", -1, 10**400, float("nan"), True]


@pytest.mark.parametrize("number", range(len(VALUES)))
def test_strange_constants_never_break_the_report(place, tmp_path, number):
    """Replaces every third constant of a run of train.py and of one of finetune.py, one at a time.

    Each value begins at another constant, so that every constant gets two or three values.
    """
    value = VALUES[number]
    for other in (place / "official", *place.glob("*/*-s1"), *place.glob("train/*-of0.1-*")):
        shutil.rmtree(other)
    paths = [next((place / script).rglob("config.json")) for script in ("train", "finetune")]
    records = {path: json.loads(path.read_text()) for path in paths}
    names = set().union(*(record["constants"] for record in records.values()))
    for name in sorted(names)[number % 3 :: 3]:
        for path, record in records.items():
            changed = record["constants"] | ({name: value} if name in record["constants"] else {})
            path.write_text(json.dumps({**record, "constants": changed}))
        found = read_runs(place)
        build_content(found, tmp_path)
        assert len(found.runs) + len(found.left_out) >= 5, name
