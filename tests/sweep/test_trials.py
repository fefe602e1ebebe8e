"""The trials of a sweep: they can be stopped, killed and shared, and none is lost or repeated."""

import itertools
import json
import os
import re
import runpy
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import optuna
import torch
from filelock import FileLock
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from lab.core import Run, runtime
from lab.data import Preprocess
from lab.report.records import read_runs
from lab.sweep import trials
from lab.sweep.search_space import next_point
from lab.sweep.trials import TRIAL_PROCESS, read_history
from model import VisionTransformer, ViTConfig
from tests.drills.harness import Process
from tests.events import Events
from tests.in_process import run_script
from tests.models.reference import SMALL, save_run
from tests.shaken import shaken

ROOT = Path(__file__).resolve().parents[2]


# Runs a script; says when it first sleeps, which is between two attempts to get a lock.
SAY_SLEEP = """
import os, runpy, sys, time
sleep = time.sleep
def say_and_sleep(seconds):
    time.sleep = sleep
    os.write(1, b"sleeps\\n")
    sleep(seconds)
time.sleep = say_and_sleep
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def num_starts(folder):
    """How often the run of each trial was started."""
    return [len(p.read_text().splitlines()) for p in sorted(folder.glob("*/starts.txt"))]


def states(folder):
    backend = optuna.storages.journal.JournalFileBackend(str(folder / "study.journal"))
    study = optuna.load_study(study_name="sweep", storage=optuna.storages.JournalStorage(backend))
    return [trial.state for trial in study.trials]


def points(space, count, sampler="random", seed=0):
    tried = []
    for _ in range(count):
        point = next_point(space, sampler, seed, tried)
        tried.append(create_trial(params=point, distributions=space, value=0.0))
    return [trial.params for trial in tried]


def forked(words, log):
    """A sweep in a process of its own, which need not import PyTorch again."""

    def sweep():
        os.setsid()  # a signal to its group is not for this process
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")

    return Process(sweep, Path(log))


def test_killed_sweep_resumes_with_the_same_trials(fake, command, run_sweep):
    """SIGKILL of the sweep ends its run, which saves. Ctrl-C saves too and names the command."""
    words = ["--space", "RATE=log:1e-3..1e-1 WIDTH=8..64", "--trials", "4", "--no-prune",
             "--fixed", "--hold-below 9"]  # fmt: skip
    events = Events(Path("events"))

    def stop_in_epoch(number, epoch):
        process = forked(command(*words), f"{epoch}.log")
        assert str(epoch) in iter(events.next, "")
        os.killpg(process.pid, number)  # what Ctrl-C in a terminal does
        ended = process.finish()
        assert events.next() == "s"
        (saved,) = fake.glob("*/saved.txt")
        assert saved.read_text() == "saved\n" * (epoch - 1)
        return ended.status, ended.output

    assert stop_in_epoch(signal.SIGKILL, 2)[0] == -signal.SIGKILL
    assert states(fake) == [TrialState.RUNNING]
    status, error = stop_in_epoch(signal.SIGINT, 3)
    assert status == 128 + signal.SIGINT
    assert "stopped and saved at 0 of 4 trials: results/sweep/s" in error
    assert re.search(r"python .*sweep\.py'? --script fake\.py .*--trials 4", error)
    assert num_starts(fake) == [2]

    with open(fake / "study.journal", "a") as file:
        file.write('{"op_code":5,"wor')  # as a full disk leaves it
    Path("events").unlink()
    Path("go").touch()
    status, record = run_sweep(*words)
    assert status == 0
    assert num_starts(fake) == [3, 1, 1, 1]
    space = {"RATE": FloatDistribution(1e-3, 1e-1, log=True), "WIDTH": IntDistribution(8, 64)}
    assert [trial["params"] for trial in record["trials"]] == points(space, 4)
    assert [trial["number"] for trial in record["trials"]] == [0, 1, 2, 3]
    assert states(fake) == [TrialState.COMPLETE] * 4
    for trial in record["trials"]:
        rows = read_history(fake / trial["folder"] / "history.csv")
        assert [row["epoch"] for row in rows] == [1, 2, 3]  # never two writers


def test_run_has_one_process_at_a_time(tmp_path):
    """A process of an interrupted trial may still be saving when another one takes over."""
    script, lock = tmp_path / "script.py", tmp_path / "lock"
    script.write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\n")
    with FileLock(lock):
        second = subprocess.Popen(
            [sys.executable, "-c", SAY_SLEEP, TRIAL_PROCESS, lock, script], text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        assert "sleeps\n" in iter(second.stdout.readline, "")
        assert not (tmp_path / "ran").exists()
    second.stdout.close()
    assert second.wait() == 0
    assert (tmp_path / "ran").exists()


def test_two_terminals_share_the_trials(fake, command, monkeypatch):
    """Each run waits until a second one has started, which takes the other process."""
    words = ["--space", "RATE=log:1e-3..1e-1", "--trials", "4"]
    os.mkfifo("company")
    monkeypatch.setattr(trials, "POLL_SECONDS", 0.02)
    both = [forked(command(*words), log) for log in ("1.log", "2.log")]
    ends = [process.finish() for process in both]
    assert [ended.status for ended in ends] == [0, 0]
    record = json.loads((fake / "sweep.json").read_text())
    assert [trial["state"] for trial in record["trials"]] == ["complete"] * 4
    assert num_starts(fake) == [1] * 4
    printed = [n for ended in ends for n in re.findall(r"^trial (\d)", ended.output, re.M)]
    assert sorted(printed) == [*"0123"]


def test_processes_run_at_the_same_time_and_share_the_cores(fake, run_sweep, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    words = ["--space", "RATE=log:1e-3..1e-1", "--trials", "3"]
    os.mkfifo("company")
    assert run_sweep(*words, "--processes", "2")[0] == 0
    threads = {path.read_text().strip() for path in fake.glob("*/starts.txt")}
    assert threads == {str(max(1, torch.get_num_threads() // 2))}


def test_poor_trial_is_pruned_and_failed_trial_is_reported(fake, run_sweep, capsys):
    """The run of the poor trial would wait forever; it has to save and exit."""
    rates = (1e-2, 2e-2, 3e-2, 1e-7, 5.0)
    space = {"RATE": CategoricalDistribution(rates)}
    seed = next(s for s in itertools.count() if points(space, 5, "grid", s)[-1]["RATE"] == 1e-7)
    status, record = run_sweep(
        "--space", f"RATE={','.join(map(str, rates))}", "--sampler", "grid", "--seed", str(seed),
        "--fixed", "--hold-below 1e-6", "--prune-after-trials", "2", "--prune-after-epochs", "2",
    )  # fmt: skip
    assert status == 0
    by_rate = {trial["params"]["RATE"]: trial for trial in record["trials"]}
    pruned, failed = by_rate[1e-7], by_rate[5.0]
    assert (pruned["state"], failed["state"]) == ("pruned", "failed")
    assert pruned["epochs"] == 2
    assert failed["error"] == "the rate is too high (exit status 1)"
    folder = fake / pruned["folder"]
    assert (folder / "saved.txt").exists()
    assert not (folder / "metrics.json").exists()
    assert "3 finished, 1 pruned, 1 failed" in record["says"]
    assert "failed: the rate is too high" in (fake / "sweep.md").read_text()
    assert "pruned after epoch 2" in capsys.readouterr().out


def test_sweep_whose_first_trials_fail_ends_with_the_reason(fake, run_sweep, capsys):
    status, record = run_sweep("--space", "RATE=5..9", "--trials", "9")
    assert status == 2
    assert num_starts(fake) == [1] * 3
    error = capsys.readouterr().err
    assert "the first 3 trials all failed. Trial 2: the rate is too high" in error
    assert str(fake / "trial-2.log") in error
    assert [trial["state"] for trial in record["trials"]] == ["failed"] * 3


def test_trials_of_an_edited_model_file_belong_to_another_sweep(fake, run_sweep):
    code = Path("fake.py").read_text()
    flag = 'parser.add_argument("--model-file", dest="MODEL_FILE")'
    Path("fake.py").write_text(code.replace("    parser.add", f"    {flag}\n    parser.add", 1))
    words = ["--space", "RATE=1e-3,1e-2", "--trials", "1", "--fixed", "--model-file mine.py"]
    for content in ("a = 1", "a = 1  # a comment", "a = 2"):
        Path("mine.py").write_text(content)
        run_sweep(*words)
    assert num_starts(fake) == num_starts(fake.with_name("s-2")) == [1]
    assert not fake.with_name("s-3").exists()


def test_a_change_of_the_code_ends_the_sweep(fake, run_sweep, capsys, monkeypatch):
    """Otherwise, trials before and after the change would be compared."""
    same = iter([{"fake.py": "1"}] * 2)  # at the start, and before the first trial
    monkeypatch.setattr(runtime, "code_hashes", lambda *_: next(same, {"fake.py": "2"}))
    assert run_sweep("--space", "RATE=1e-3,1e-2", "--trials", "2")[0] == 2
    assert "fake.py or code that it uses has changed since" in capsys.readouterr().err
    assert num_starts(fake) == [1]


def test_a_change_of_the_data_ends_the_sweep(fake, run_sweep, capsys):
    """The trial on the changed data does not count, and runs again on the original data."""
    words = ["--space", "RATE=1e-3,1e-2", "--trials"]
    for data, asked, expected in (("old", "1", (0, 1)), ("new", "2", (2, 1)), ("old", "2", (0, 2))):
        Path("data.txt").write_text(data)
        status, record = run_sweep(*words, asked)
        assert (status, len(record["trials"])) == expected
        assert ("trial 1 has different data than trial 0" in capsys.readouterr().err) == bool(
            status
        )


def test_a_swept_constant_may_change_the_data(fake, run_sweep):
    code = Path("fake.py").read_text()
    flag = 'parser.add_argument("--train-fraction", dest="TRAIN_FRACTION", type=float)'
    code = code.replace("    parser.add", f"    {flag}\n    parser.add", 1)
    Path("fake.py").write_text(code.replace('"data": data', '"data": str(c["TRAIN_FRACTION"])'))
    status, record = run_sweep("--space", "TRAIN_FRACTION=0.1,1", "--sampler", "grid")
    assert (status, len(record["trials"])) == (0, 2)


def test_finished_sweep_is_kept_until_it_is_overwritten(fake, run_sweep, capsys):
    space = ["--space", "RATE=1e-3,1e-2,1e-1 POOL=avg,token", "--sampler", "grid"]
    status, record = run_sweep(*space, "--processes", "2")
    assert status == 0
    tried = sorted(tuple(trial["params"].values()) for trial in record["trials"])
    assert tried == sorted(itertools.product((1e-3, 1e-2, 1e-1), ("avg", "token")))
    for trial in record["trials"]:
        accuracies = [
            row["val_accuracy"] for row in read_history(fake / trial["folder"] / "history.csv")
        ]
        assert trial["val_accuracy"] == max(accuracies) == accuracies[1] > accuracies[-1]
    assert record["trials"][record["best"]]["params"]["RATE"] == 0.01
    output = capsys.readouterr().out
    assert output.count("validation accuracy 90.00 %") == 2
    assert output.rstrip().endswith(str(fake / "parallel.png"))
    for name in ("parallel", "rate", "pool"):
        assert (fake / f"{name}.png").stat().st_size > 5000

    assert run_sweep(*space)[1]["trials"] == record["trials"]
    assert num_starts(fake) == [1] * 6
    assert run_sweep(*space, "--trials", "2")[1]["says"].startswith("6 trials of fake.py: 6 fin")
    run_sweep("--space", "RATE=1e-3,1e-2", "--trials", "1")
    run_sweep("--space", "RATE=1e-3,1e-2", "--trials", "2")
    assert num_starts(fake.with_name("s-2")) == [1, 1]
    assert "SPACE: RATE=1e-3,1e-2,1e-1 POOL=avg,token there" in capsys.readouterr().out
    assert run_sweep(*space, "--overwrite")[1]["started"] >= record["started"]
    assert num_starts(fake) == [1] * 6
    assert "starting over" in capsys.readouterr().out


def test_incomplete_row_of_a_history_is_ignored(tmp_path):
    run = Run(tmp_path)
    for epoch in (1, 2, 3):
        run.append_history({"epoch": epoch, "val_accuracy": 0.9876, "seconds": 1.25, "images": 7})
    path = tmp_path / "history.csv"
    content = path.read_bytes()
    for end in range(len(content) + 1):
        path.write_bytes(content[:end])
        rows = read_history(path)
        assert len(rows) == max(0, content[:end].count(b"\r") - 1)
        assert all((row["val_accuracy"], row["seconds"]) == (0.9876, 1.25) for row in rows)


def test_trial_equals_the_run_made_by_hand(tmp_path, run_sweep, monkeypatch):
    """Same flags, same records, epoch for epoch; and report.py reads the sweep."""
    monkeypatch.chdir(ROOT)
    fixed = "--dataset digits --epochs 2 --embed-dim 16 --depth 1 --num-heads 1"
    _, record = run_sweep(
        "--script", "train.py", "--fixed", fixed, "--trials", "1", "--results-dir", str(tmp_path),
        "--space", "LEARNING_RATE=log:1e-3..1e-2 FLIP=true,false", place=tmp_path,
    )  # fmt: skip
    (trial,) = record["trials"]
    rate, flip = trial["params"].values()
    flags = [*fixed.split(), "--learning-rate", str(rate), "--flip" if flip else "--no-flip"]
    place = ["--results-dir", str(tmp_path / "hand"), "--name", "h"]
    assert run_script(["train.py", *flags, *place]).status == 0
    swept, made = Run(tmp_path / "s" / trial["folder"]), Run(tmp_path / "hand" / "h")
    clock = {"seconds", "images_per_second", "peak_memory_mb", "training_seconds", "load"}
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


def test_linear_probe_can_be_swept(tmp_path, run_sweep, monkeypatch, capsys):
    model = shaken(VisionTransformer(ViTConfig(**SMALL, num_classes=3)))
    preprocess = Preprocess(32, [0.5] * 3, [0.5] * 3)
    pretrained = save_run(tmp_path / "pretrained", model, ["a", "b", "c"], preprocess)
    monkeypatch.chdir(ROOT)
    status, record = run_sweep(
        "--script", "finetune.py", "--trials", "1", "--space", "LEARNING_RATE=1e-2,1e-3",
        "--fixed",
        "--dataset digits --mode head --epochs 20 --weight-decay 0 "
        f"--data-dir {shlex.quote(str(tmp_path))} --pretrained {shlex.quote(pretrained)}",
        "--results-dir", str(tmp_path), place=tmp_path,
    )  # fmt: skip
    assert status == 0, capsys.readouterr()
    (trial,) = record["trials"]
    metrics = Run(tmp_path / "s" / trial["folder"]).metrics()
    assert trial["val_accuracy"] == metrics["val_accuracy"] > 0.15
    assert trial["seconds"] == metrics["training_seconds"]
