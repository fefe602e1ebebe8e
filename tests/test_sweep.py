"""sweep.py: what it tries, what it makes of it, and that it may be stopped at any moment."""

import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Literal

import optuna
import pytest
import torch
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState, create_trial

from lab import sweep_trials
from lab.core.errors import UserError
from lab.core.runs import Run
from lab.core.stats import wilson_interval
from lab.report.records import read_runs
from lab.sweep_process import rows_of
from lab.sweep_records import importance, says
from lab.sweep_script import Script, flag
from lab.sweep_space import Parameter, parse_space, suggest, walk

ROOT = Path(__file__).resolve().parents[1]
TYPES = {"RATE": float, "WIDTH": int | None, "POOL": Literal["token", "avg"], "FLIP": bool,
         "MODEL": str, "MODE": Literal["head", "full", "all"], "NAME": str | None}  # fmt: skip
JOURNAL = Path("results/sweep/s/study.journal")
PLAIN = Script(Path("plain.py"), TYPES, {"MODE": "full"}, {}, ["--name-of-nothing=1"])

# A script with the conventions of the lab, whose validation accuracy is best in its second epoch,
# and the higher the nearer RATE is to 0.01. A hopeless one trains until it is told to stop.
FAKE = """
import csv, json, math, os, signal, sys, time
from pathlib import Path
from typing import Literal
from lab.core import constants

DATASET: str = "made up"
RATE: float = 0.01
WIDTH: int | None = None
POOL: Literal["token", "avg"] = "token"
EPOCHS: int = 3
FOREVER_BELOW: float = 0  # rates that are never done
COMPANY: int = 1  # runs that must have begun before this one goes on
RESULTS_DIR: str = "results"
NAME: str | None = None


def main():
    c = constants.override(sys.modules[__name__])
    stop = []
    signal.signal(signal.SIGTERM, lambda *_: stop.append(1))
    folder = Path(c["RESULTS_DIR"], c["NAME"])
    folder.mkdir(exist_ok=True)
    with open(folder / "starts.txt", "a") as file:
        file.write(os.environ.get("OMP_NUM_THREADS", "none") + "\\n")
    (folder / "config.json").write_text(json.dumps({"dataset": {"val": 1000}}))
    if c["RATE"] > 1:
        sys.exit("error: the rate is too high")
    while len(list(folder.parent.glob("*/starts.txt"))) < c["COMPANY"] and not stop:
        time.sleep(0.05)
    path = folder / "history.csv"
    epoch = len(path.read_text().splitlines()) if path.exists() else 1
    good = 0.9 - abs(math.log10(c["RATE"]) + 2) / 10
    while epoch <= (2000 if c["RATE"] < c["FOREVER_BELOW"] else c["EPOCHS"]):
        row = {"epoch": epoch, "val_accuracy": good - 0.01 * (epoch != 2), "seconds": 0.5}
        with open(path, "a", newline="") as file:
            writer = csv.DictWriter(file, row)
            if epoch == 1:
                writer.writeheader()
            writer.writerow(row)
        time.sleep(0.05)
        if stop:
            with open(folder / "saved", "a") as file:
                file.write("saved\\n")
            sys.exit(143)
        epoch += 1
    metrics = {"val_accuracy": good, "test_accuracy": 0.25, "test_accuracy_95": [0.2, 0.3],
               "test_images": 300, "training_seconds": 1.5}
    (folder / "metrics.json").write_text(json.dumps(metrics))
    print(folder / "curves.png")


if __name__ == "__main__":
    main()
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A folder with fake.py, from which sweeps of it run."""
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(sweep_trials, "POLL", 0.05)
    return tmp_path


def command(*words):
    return [str(ROOT / "sweep.py"), "--script", "fake.py", "--name", "s", *words]


def sweep(monkeypatch, *words, place=Path("results/sweep")):
    """Runs sweep.py in this process. Returns: its status, and what it left."""
    monkeypatch.setattr(sys, "argv", command(*words))
    status = 0
    try:
        runpy.run_path(str(ROOT / "sweep.py"), run_name="__main__")
    except SystemExit as end:
        status = end.code
    return status, json.loads((place / "s" / "sweep.json").read_text())


def study():
    storage = optuna.storages.journal.JournalFileBackend(str(JOURNAL))
    storage = optuna.storages.JournalStorage(storage)
    return optuna.load_study(study_name="sweep", storage=storage)


def params(record):
    return sorted(tuple(t["params"].values()) for t in record["trials"])


def starts(folder=Path("results/sweep/s")):
    return sorted(len(p.read_text().splitlines()) for p in folder.glob("*/starts.txt"))


def until(happened):
    for _ in range(1200):
        if found := happened():
            return found
        time.sleep(0.1)
    raise AssertionError("it did not happen within two minutes")


# --- What is tried ---


def test_random_spaces_are_read_as_they_are_written():
    rng = random.Random(seed := random.randrange(10**6))
    for _ in range(300):
        space = []
        for name in rng.sample(["RATE", "WIDTH", "POOL", "FLIP", "MODEL"], rng.randint(1, 5)):
            values = {
                "RATE": [round(rng.uniform(1e-7, 3), 7) for _ in range(3)],
                "WIDTH": [None, *rng.sample(range(-9, 99), 3)], "POOL": ["avg", "token"],
                "FLIP": [False, True], "MODEL": ["vit", "a b", "x/y.z", "1..2"],
            }[name]  # fmt: skip
            numbers = sorted({v for v in values if not isinstance(v, str | None)})
            if name in ("RATE", "WIDTH") and rng.random() < 0.5 and len(numbers) > 1:
                low, high = numbers[0], numbers[-1]
                space.append(Parameter(name, (), low, high, low > 0 and rng.random() < 0.5))
            else:
                space.append(
                    Parameter(name, tuple(rng.sample(values, rng.randint(2, len(values)))))
                )
        text = " ".join(f"'{p}'" for p in space)
        assert parse_space(text, PLAIN, "random") == space, (seed, text)
        for point in itertools.islice(walk(space, "random", 0), 5):
            for p in space:
                value = point[p.name]
                assert value in p.choices if p.choices else p.low <= value <= p.high, (seed, text)
                assert type(value) in (int, float, str, bool, type(None))


@pytest.mark.parametrize(
    ("space", "sentence"),
    [
        ("LERNING_RATE=1,2", "train.py has no constant LERNING_RATE; do you mean LEARNING_RATE"),
        ("learning_rate=1,2", "no constant learning_rate; do you mean LEARNING_RATE"),
        ("DEPTH", "'DEPTH' must be NAME=a,b,c or NAME=low..high"),
        ("DEPTH=1,two", "DEPTH cannot be 'two': it takes int or none"),
        ("DEPTH=1..2.5", "DEPTH cannot be '2.5': it takes int or none"),
        ("LEARNING_RATE=nan,1", "LEARNING_RATE cannot be 'nan': it takes float or none"),
        ("GLOBAL_POOL=avg,max", "GLOBAL_POOL cannot be 'max': it takes token or avg"),
        ("GLOBAL_POOL=1..2", "GLOBAL_POOL cannot be '1..2': it takes token or avg"),
        ("COMPILE=yes,no", "COMPILE cannot be 'yes': it takes true or false"),
        ("DEPTH=3..1", "DEPTH=3..1: the low end must be below the high end"),
        ("DEPTH=3..3", "the low end must be below the high end"),
        ("LEARNING_RATE=log:0..1", "a logarithmic range must start above 0"),
        ("LEARNING_RATE=log:1,2", "log: needs a range"),
        ("DEPTH=3", "DEPTH=3 is one value"),
        ("DEPTH=3,03", "DEPTH=3,03 has a value twice"),
        ("DEPTH=1,2 DEPTH=1,2", "SPACE has DEPTH twice"),
        ("EPOCHS=1,2", "EPOCHS is in SPACE and in FIXED"),
        ("NAME=a,b", "NAME cannot be swept: it is set by the sweep"),
        ("FRESH=true,false", "FRESH cannot be swept"),
        ("DATA_DIR=a,b", "DATA_DIR cannot be swept: it changes no result"),
        ("DATASET=digits,pets", "DATASET cannot be swept: it changes the validation images"),
        ("", "SPACE is empty"),
        ("DEPTH='1,2", "cannot be read: No closing quotation"),
    ],
)
def test_a_bad_space_ends_with_a_sentence(space, sentence):
    script = Script.load(str(ROOT / "train.py"), "--epochs 3")
    with pytest.raises(UserError, match=re.escape(sentence)):
        parse_space(space, script, "random")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--script", "trian.py"], "there is no script 'trian.py'; do you mean train.py"),
        (["--script", "model.py"], "'model.py' has no constants that are flags"),
        (["--script", "README.md"], "there is no script 'README.md'; there are attention_viz.py"),
        (["--script", "attention_viz.py"], "'attention_viz.py' trains nothing"),
        (["--script", "sweep.py"], "'sweep.py' trains nothing"),
        (["--fixed", "--epoch 3"], "FIXED: unrecognized arguments: --epoch"),
        (["--fixed", "--epochs many"], "FIXED: argument --epochs: invalid int or none value"),
        (["--fixed", "--name x"], "FIXED: the sweep sets NAME itself"),
        (["--sampler", "grid"], "LEARNING_RATE=log:0.0003..0.01 is a range: write"),
        (["--script", "finetune.py", "--fixed", "--mode all"], "MODE=all is many runs"),
        (["--script", "finetune.py", "--space", "MODE=head,all"], "MODE=all is many runs"),
        (["--script", "finetune_swin.py", "--space", "PRETRAINED=a,b"], "no constant PRETRAINED"),
        (["--script", "cnn_baseline.py", "--space", "MODEL_ARGS=a,b"], "no constant MODEL_ARGS"),
        (["--trials", "0"], "TRIALS=0 must be at least 1"),
        (["--processes", "0"], "PROCESSES=0 must be at least 1"),
    ],
)
def test_a_mistake_ends_with_a_sentence_before_anything_runs(
    words, sentence, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--results-dir", str(tmp_path / "no"), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("sweep.py", run_name="__main__")
    assert end.value.code == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_constants_of_the_script_beneath_can_be_swept():
    for name in ("cnn_baseline.py", "finetune_swin.py"):
        script = Script.load(str(ROOT / name), "")
        assert parse_space("LEARNING_RATE=1e-3,1e-2", script, "grid")


def test_a_grid_is_the_product_once_and_more_trials_add_to_the_same():
    space = parse_space("WIDTH=1,2,none POOL=avg,token FLIP=true,false", PLAIN, "grid")
    grid = [tuple(point.values()) for point in walk(space, "grid", 3)]
    product = list(itertools.product((1, 2, None), ("avg", "token"), (True, False)))
    assert sorted(grid, key=str) == sorted(product, key=str)
    assert grid != product
    assert grid == [tuple(point.values()) for point in walk(space, "grid", 3)]
    # A random walk through as small a space finds all of it, ends, and repeats nothing.
    found = [tuple(point.values()) for point in walk(space, "random", 3)]
    assert sorted(found, key=str) == sorted(product, key=str)


def test_tpe_goes_where_it_was_good_and_repeats_nothing():
    space = [Parameter("RATE", low=1e-5, high=1.0, log=True), Parameter("POOL", ("avg", "token"))]
    trials, seen = [], set()
    for _ in range(40):
        point = suggest(space, 0, trials)
        seen.add(tuple(point.values()))
        value = -abs(math.log10(point["RATE"]) + 2)
        distributions = {p.name: p.distribution for p in space}
        trials.append(create_trial(params=point, distributions=distributions, value=value))
    assert len(seen) == 40
    late = sorted(t.value for t in trials[20:])
    assert late[10] > sorted(t.value for t in trials[:10])[5]  # the first ten are random


def test_flags_are_read_back_as_the_same_values():
    values = {"LEARNING_RATE": 1.234e-7, "DEPTH": None, "COMPILE": True, "FLIP": False,
              "MODEL_ARGS": "a=1 b=(2,)", "TRANSLATE": -0.5}  # fmt: skip
    words = " ".join(f"'{flag(name, value)}'" for name, value in values.items())
    script = Script.load(str(ROOT / "train.py"), words)
    assert {name: script.values[name] for name in values} == values


# --- Sweeps ---


def test_a_trial_is_the_run_made_by_hand(tmp_path, monkeypatch):
    """Same flags, same metrics, epoch for epoch; and the report's reader takes the sweep in."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    fixed = "--epochs 2 --embed-dim 16 --depth 1 --num-heads 1"
    words = ["--script", "train.py", "--fixed", fixed, "--trials", "1", "--results-dir",
             str(tmp_path), "--space", "LEARNING_RATE=log:1e-3..1e-2 FLIP=true,false"]  # fmt: skip
    _, record = sweep(monkeypatch, *words, place=tmp_path)
    (trial,) = record["trials"]
    rate, flip = trial["params"].values()
    flags = [*fixed.split(), "--learning-rate", str(rate), "--flip" if flip else "--no-flip"]
    place = ["--results-dir", str(tmp_path / "hand"), "--name", "h"]
    subprocess.run([sys.executable, "train.py", *flags, *place], check=True, timeout=300)
    swept, made = Run(tmp_path / "s" / trial["folder"]), Run(tmp_path / "hand" / "h")
    clock = {"seconds", "images_per_second", "peak_memory_mb", "training_seconds"}
    for ours, theirs in zip(
        [*swept.history(), swept.metrics()], [*made.history(), made.metrics()], strict=True
    ):
        assert {k: v for k, v in ours.items() if k not in clock} == {
            k: v for k, v in theirs.items() if k not in clock
        }
    assert swept.config()["constants"] == made.config()["constants"]
    assert trial["val_accuracy"] == made.metrics()["val_accuracy"]
    assert record["test_accuracy"] == made.metrics()["test_accuracy"]
    found = read_runs(tmp_path / "s")
    assert not found.left_out
    assert [run.sweep for run in found.runs] == [tmp_path / "s"]


def test_the_head_alone_can_be_swept(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    fixed = f"--mode head --epochs 1 --weight-decay 0 --data-dir {tmp_path}"
    words = ["--script", str(ROOT / "finetune.py"), "--fixed", fixed, "--trials", "1",
             "--space", "LEARNING_RATE=1e-2,1e-3", "--results-dir", str(tmp_path)]  # fmt: skip
    status, record = sweep(monkeypatch, *words, place=tmp_path)
    assert status == 0, capsys.readouterr()
    (trial,) = record["trials"]
    metrics = Run(tmp_path / "s" / trial["folder"]).metrics()
    assert trial["val_accuracy"] == metrics["val_accuracy"] > 0.15
    assert trial["seconds"] == metrics["training_seconds"]


def test_only_whole_epochs_are_read_of_a_history_that_is_being_written(tmp_path):
    run = Run(tmp_path)
    for epoch in (1, 2, 3):
        run.append_history({"epoch": epoch, "val_accuracy": 0.9876, "seconds": 1.25, "images": 7})
    path = tmp_path / "history.csv"
    whole = path.read_bytes()
    for end in range(len(whole) + 1):
        path.write_bytes(whole[:end])
        rows = rows_of(path)
        assert len(rows) in (whole[:end].count(b"\n") - 1, max(0, whole[:end].count(b"\r") - 1), 0)
        assert all(row == {**row, "val_accuracy": 0.9876, "seconds": 1.25} for row in rows)
    assert [row["epoch"] for row in rows] == [1, 2, 3]


def test_the_objective_is_the_best_validation_accuracy(fake, monkeypatch, capsys):
    space = ["--space", "RATE=1e-3,1e-2,1e-1 POOL=avg,token", "--sampler", "grid"]
    status, record = sweep(monkeypatch, *space)
    assert status == 0
    assert params(record) == sorted(itertools.product((1e-3, 1e-2, 1e-1), ("avg", "token")))
    for trial in record["trials"]:
        rows = rows_of(Path("results/sweep/s", trial["folder"], "history.csv"))
        best = [row["val_accuracy"] for row in rows]
        assert trial["val_accuracy"] == max(best) == best[1] > best[-1]
        assert record["trials"][record["best"]]["val_accuracy"] >= trial["val_accuracy"]
    assert record["trials"][record["best"]]["params"]["RATE"] == 0.01
    out = capsys.readouterr().out
    assert out.count("validation 90.00 %") >= 2
    assert out.rstrip().endswith(str(Path("results/sweep/s/parallel.png")))
    for name in ("parallel", "rate", "pool"):
        assert Path(f"results/sweep/s/{name}.png").stat().st_size > 5000
    # The same command does nothing again; another space opens another folder.
    assert sweep(monkeypatch, *space)[1]["trials"] == record["trials"]
    assert starts() == [1] * 6
    sweep(monkeypatch, "--space", "RATE=1e-3,1e-2", "--trials", "1")
    assert len(starts(Path("results/sweep/s-2"))) == 1
    assert "SPACE RATE=0.001,0.01,0.1 POOL=avg,token there" in capsys.readouterr().out
    assert starts() == [1] * 6
    sweep(monkeypatch, *space, "--fresh")
    assert starts() == [1] * 6
    assert "starting over" in capsys.readouterr().out


def test_a_killed_sweep_goes_on_with_the_same_trials(fake, monkeypatch, capsys):
    """SIGKILL leaves a run behind, which is told to save itself; after Ctrl-C nothing is left."""
    words = ["--space", "RATE=log:1e-3..1e-1 WIDTH=8..64", "--trials", "4", "--no-prune"]
    forever = ["--fixed", "--forever-below 9"]

    def killed(number, begun):
        with subprocess.Popen(
            [sys.executable, *command(*words, *forever)], stderr=subprocess.PIPE, text=True,
            start_new_session=True,
        ) as process:  # fmt: skip
            until(lambda: starts() == [begun] and JOURNAL.read_text().count('"process"') == begun)
            (path,) = until(lambda: [*Path("results/sweep/s").glob("*/history.csv")])
            rows = len(rows_of(path))
            until(lambda: len(rows_of(path)) > rows)
            os.killpg(process.pid, number)  # as Ctrl-C in a terminal, which all of it hears
            return process.wait(60), process.stderr.read()

    assert killed(signal.SIGKILL, 1)[0] == -signal.SIGKILL
    (begun,) = Path("results/sweep/s").glob("*/history.csv")
    (trial, *_) = study().trials
    assert trial.state == TrialState.RUNNING
    status, err = killed(signal.SIGINT, 2)
    assert status == 128 + signal.SIGINT, err
    assert "stopped and saved at 0 of 4 trials: results/sweep/s" in err
    assert re.search(r"go on with: python .*sweep\.py'? --script fake\.py .*--trials 4", err)
    assert starts() == [2]  # the first run was saved and went on, and no other has begun
    assert (begun.parent / "saved").read_text() == "saved\n" * 2
    assert [t.state for t in study().trials] == [TrialState.WAITING] * 4
    epochs = [row["epoch"] for row in rows_of(begun)]
    assert epochs == list(range(1, len(epochs) + 1))  # never two that wrote at once

    with open(JOURNAL, "a") as file:
        file.write('{"op_code":5,"wor')  # as a full disk leaves it
    script = Path("fake.py")  # now the runs come to an end
    script.write_text(FAKE.replace("2000 if", "3 if"))
    status, record = sweep(monkeypatch, *words, *forever)
    assert status == 0
    assert sorted(starts()) == [1, 1, 1, 3]
    space = [Parameter("RATE", (), 1e-3, 1e-1, True), Parameter("WIDTH", (), 8, 64)]
    assert [t["params"] for t in record["trials"]] == [
        *itertools.islice(walk(space, "random", 0), 4)
    ]
    assert {t.state for t in study().trials} == {TrialState.COMPLETE}
    assert rows_of(begun)[: len(epochs)]


def test_two_sweeps_at_once_share_the_trials(fake):
    """Each run waits until a second one has begun, which only another process can do."""
    words = ["--space", "RATE=log:1e-3..1e-1", "--trials", "4", "--fixed", "--company 2"]
    both = [
        subprocess.Popen([sys.executable, *command(*words)], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    outs = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0]
    record = json.loads(Path("results/sweep/s/sweep.json").read_text())
    assert [t["state"] for t in record["trials"]] == ["complete"] * 4
    assert starts() == [1] * 4
    assert sorted(n for out in outs for n in re.findall(r"^trial (\d)", out, re.M)) == [*"0123"]


def test_trials_at_once_share_the_cores(fake, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    words = ["--space", "RATE=log:1e-3..1e-1", "--trials", "3"]
    assert sweep(monkeypatch, *words, "--processes", "2", "--fixed", "--company 2")[0] == 0
    share = str(max(1, torch.get_num_threads() // 2))
    said = [p.read_text().strip() for p in Path("results/sweep/s").glob("*/starts.txt")]
    assert said == [share] * 3


def test_a_hopeless_trial_is_pruned_and_a_failed_one_told(fake, monkeypatch, capsys):
    """The hopeless run would train for ever; it saves itself, as one that is stopped does."""
    status, record = sweep(
        monkeypatch, "--space", "RATE=1e-2,2e-2,3e-2,1e-7,5.0", "--sampler", "grid", "--seed", "0",
        "--fixed", "--forever-below 1e-6", "--prune-after-trials", "2", "--prune-after-epochs", "2",
    )  # fmt: skip
    assert status == 0
    by_rate = {t["params"]["RATE"]: t for t in record["trials"]}
    pruned, failed = by_rate[1e-7], by_rate[5.0]
    assert (pruned["state"], failed["state"]) == ("pruned", "failed")
    assert pruned["epochs"] >= 2
    assert failed["error"] == "the rate is too high"
    folder = Path("results/sweep/s", pruned["folder"])
    assert (folder / "saved").exists()
    assert not (folder / "metrics.json").exists()
    assert "3 finished, 1 pruned as hopeless, 1 failed" in record["says"]
    table = Path("results/sweep/s/sweep.md").read_text()
    assert "failed: the rate is too high" in table
    assert f"pruned after epoch {pruned['epochs']}" in capsys.readouterr().out


def test_a_sweep_whose_first_trials_all_fail_ends_with_the_reason(fake, monkeypatch, capsys):
    status, record = sweep(monkeypatch, "--space", "RATE=5..9", "--trials", "9")
    assert status == 2
    assert starts() == [1] * 3
    err = capsys.readouterr().err
    assert "the first 3 trials all failed; trial 2: the rate is too high" in err
    assert [t["state"] for t in record["trials"]] == ["failed"] * 3


# --- What came out ---


def made_up(accuracies, space):
    """A study, and its record as sweep.json has it, of accuracies on 1,000 validation images."""
    study = optuna.create_study(direction="maximize")
    distributions = {p.name: p.distribution for p in space}
    points = itertools.islice(walk(space, "random", 1), len(accuracies))
    for point, value in zip(points, accuracies, strict=True):
        study.add_trial(create_trial(params=point, distributions=distributions, value=value))
    best = max(study.trials, key=lambda t: t.value)
    trials = [{"number": t.number, "state": "complete", "params": t.params,
               "val_accuracy": t.value} for t in study.trials]  # fmt: skip
    record = {
        "script": "train.py", "asked": len(trials) + 2, "trials": trials, "best": best.number,
        "val_images": 1000, "val_accuracy_95": [*wilson_interval(round(1000 * best.value), 1000)],
        "test_accuracy": 0.5, "test_accuracy_95": [0.4, 0.6], "test_images": 100,
        **importance(study, space, study.trials, 0),
    }  # fmt: skip
    return study, record


SPACE = [Parameter("RATE", low=0.0, high=1.0), Parameter("WIDTH", (8, 16, 32)),
         Parameter("POOL", ("avg", "token"))]  # fmt: skip


def test_shares_are_optunas_and_find_what_matters():
    points = list(itertools.islice(walk(SPACE, "random", 1), 40))
    accuracies = [0.5 + 0.4 * p["RATE"] + 0.02 * (p["POOL"] == "avg") for p in points]
    study, record = made_up(accuracies, SPACE)
    theirs = optuna.importance.get_param_importances(
        study, evaluator=FanovaImportanceEvaluator(seed=0)
    )
    ours, total = record["importance"], sum(record["importance"].values())
    assert {k: v / total for k, v in ours.items()} == pytest.approx(theirs, abs=1e-3)
    assert ours["RATE"] > 0.9
    text = says(record)
    assert f"RATE {100 * ours['RATE']:.0f} %" in text
    assert f"a forest explains {100 * record['predicted']:.0f} % of it" in text
    assert text.count("RATE mattered most") == 1
    assert f"trial {record['best']} (RATE {points[record['best']]['RATE']}," in text
    assert f"{100 * max(accuracies):.2f} % of 1,000 validation images" in text
    assert text.startswith("Trials of train.py: 40 finished, 2 still to do. ")


def test_noise_is_not_sold_as_importance():
    rng = random.Random(0)
    _, record = made_up([0.9 + rng.uniform(0, 0.001) for _ in range(40)], SPACE)
    assert max(record["importance"].values()) > 0.2  # fANOVA finds shares in anything
    assert "these shares are noise" in says(record)
    assert "mattered most" not in says(record)
    assert "1,000 images cannot tell them apart" in says(record)


def test_too_few_or_equal_trials_get_no_shares():
    _, record = made_up([0.1 * i for i in range(9)], SPACE)
    assert record["importance"] == {}
    assert "fANOVA needs at least 10 finished trials, not 9." in says(record)
    assert "Inside the interval of the best: 1 of the best 9." in says(record)
    _, record = made_up([0.5] * 12, SPACE)
    assert "Nothing mattered: all finished trials reached the same" in says(record)
