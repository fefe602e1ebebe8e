"""A run finds its folder by constants, data and code; no two processes train in one folder."""

import errno
import json
import math
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from filelock import FileLock

from lab.core import Run, UserError, constants, run_folders, runs, runtime
from tests.drills.harness import Process, event

ROOT = Path(__file__).resolve().parents[2]
CONSTANTS = {"LEARNING_RATE": 0.002, "BATCH_SIZE": 64, "DATASET": "digits", "NAME": None, "SEED": 0}
FACTS = {"dataset": {"fingerprint": "abc"}, "model": {"parameters": 1}}
CODE = {"model.py": "1", "train.py": "2", "lab/core/runs.py": "3"}


@pytest.fixture
def code(monkeypatch):
    """The hashes that runs see; tests change them."""
    hashes = dict(CODE)
    monkeypatch.setattr(runs, "code_hashes", lambda *scripts: {**hashes, **dict.fromkeys(scripts)})
    yield hashes
    run_folders.unlock_all()


@pytest.fixture
def place(tmp_path, code):
    return tmp_path / "results" / "train"


def opened(
    place, name="digits-vit-s0", overwrite=False, data="abc", finish=True, resume=False, **changed
):
    facts = {**FACTS, "dataset": {"fingerprint": data}}
    run = Run.open(place, name, {**CONSTANTS, **changed}, facts, overwrite, resume)
    if finish:
        (run.folder / "metrics.json").write_text("{}")
    return run.folder.name


def test_the_same_run_finds_its_folder_and_records_what_identifies_it(place, capsys):
    assert opened(place) == opened(place) == "digits-vit-s0"
    assert capsys.readouterr().out == ""
    config = Run(place / "digits-vit-s0").config()
    assert config["code"] == CODE
    assert config["data"] == "abc"
    assert config["constants"]["BATCH_SIZE"] == 64
    assert config["model"] == {"parameters": 1}
    assert {"command", "started", "versions", "schema"} <= config.keys()
    assert oct((place / "digits-vit-s0").stat().st_mode)[-3:] == "755"


def test_other_code_is_a_new_run_and_the_changed_files_are_named(place, code, capsys):
    opened(place)
    code["model.py"] = "other"
    assert opened(place) == "digits-vit-s0-2"
    (line,) = capsys.readouterr().out.splitlines()
    started = Run(place / "digits-vit-s0").config()["started"]
    assert line == (
        f"model.py has changed since {started}: starting a new run, {place}/digits-vit-s0-2"
    )
    code["train.py"] = code["lab/core/runs.py"] = code["lab/core/x.py"] = "other"
    assert opened(place) == "digits-vit-s0-3"
    out = capsys.readouterr().out
    assert out.startswith("train.py, lab/core/runs.py, lab/core/x.py have changed since ")
    code.clear()
    code.update(CODE)
    assert opened(place) == "digits-vit-s0"


def test_a_stopped_run_does_not_resume_with_other_code(place, code, capsys):
    opened(place, finish=False)
    (place / "digits-vit-s0" / "last.pt").touch()
    code["model.py"] = "other"
    assert opened(place, finish=False) == "digits-vit-s0-2"
    assert not (place / "digits-vit-s0-2" / "last.pt").exists()
    assert "digits-vit-s0 was stopped: undo the change to resume it" in (capsys.readouterr().out)


def test_a_stopped_run_resumes_with_other_code_if_the_user_agrees(place, code, capsys):
    opened(place, finish=False)
    (place / "digits-vit-s0" / "last.pt").touch()
    code["model.py"] = "other"
    again = {"resume": True, "finish": False}
    assert opened(place, BATCH_SIZE=32, **again) == "digits-vit-b32-s0", "not the same run"
    assert opened(place, **again) == "digits-vit-s0"
    assert "digits-vit-s0 resumes although model.py has changed" in capsys.readouterr().out
    assert (place / "digits-vit-s0" / "last.pt").exists()
    config = Run(place / "digits-vit-s0").config()
    assert config["code"]["model.py"] == "other"
    assert [entry["code"] for entry in config["earlier_code"]] == [CODE]
    assert opened(place) == "digits-vit-s0", "the same command resumes without the option"
    code["model.py"] = "third"
    assert opened(place, **again) == "digits-vit-s0-2", "a finished run is not resumed"


def test_further_scripts_are_part_of_the_code(place):
    place.mkdir(parents=True)
    folders = [
        Run.open(place, "s", CONSTANTS, FACTS, False, False, True, scripts).folder.name
        for scripts in (("a.py",), ("a.py",), ("b.py",))
    ]
    assert folders == ["s", "s", "s-2"]


def test_a_record_without_code_is_another_run(place, capsys):
    opened(place)
    path = place / "digits-vit-s0" / "config.json"
    config = json.loads(path.read_text())
    del config["code"], config["name"]
    path.write_text(json.dumps(config))
    assert opened(place) == "digits-vit-s0-2"
    assert "the code (which that run did not record) may have changed" in capsys.readouterr().out
    assert Run(place / "digits-vit-s0").config()["constants"]["SEED"] == 0


def test_default_names_show_what_differs_in_one_line(place, capsys):
    assert opened(place) == "digits-vit-s0"
    assert opened(place, LEARNING_RATE=0.003, BATCH_SIZE=32) == "digits-vit-lr0.003-b32-s0"
    (line,) = capsys.readouterr().out.splitlines()
    assert line == (
        f"{place}/digits-vit-s0 has different settings (LEARNING_RATE: 0.002 there, 0.003 in this "
        f"run; BATCH_SIZE: 64 there, 32 in this run): starting a new run, "
        f"{place}/digits-vit-lr0.003-b32-s0"
    )
    assert opened(place, FLIP=False) == "digits-vit-no-flip-s0"
    assert opened(place, LEARNING_RATE=0.003, BATCH_SIZE=32) == "digits-vit-lr0.003-b32-s0"
    assert opened(place, data="other") == "digits-vit-s0-2"
    assert opened(place, A=1, B=2, C=3, D=4) == "digits-vit-s0-3"
    assert opened(place, FIXED="--epochs 3 --flip") == "digits-vit-s0-4"


def test_the_fourteenth_run_prints_one_line(place, capsys):
    for i in range(13):
        opened(place, "mine", NAME="mine", LEARNING_RATE=i / 100)
    capsys.readouterr()
    assert opened(place, "mine", NAME="mine", LEARNING_RATE=0.5) == "mine-14"
    (line,) = capsys.readouterr().out.splitlines()
    assert "and 12 other runs have different settings" in line
    assert "LEARNING_RATE: 0.12 there, 0.5 in this run" in line


def test_a_runs_folder_is_found_after_others_are_deleted(place):
    opened(place)
    second = opened(place, LEARNING_RATE=0.5)
    for path in (place / "digits-vit-s0").iterdir():
        path.unlink()
    assert opened(place, LEARNING_RATE=0.5) == second
    assert opened(place, LEARNING_RATE=0.7) == "digits-vit-s0", "an empty folder is used"


def test_a_damaged_folder_is_left_alone(place):
    opened(place)
    (place / "digits-vit-s0" / "config.json").write_text("{")
    assert opened(place) == "digits-vit-s0-2"
    assert (place / "digits-vit-s0" / "metrics.json").exists()


def test_overwriting_replaces_the_same_run_only(place, code, capsys):
    opened(place)
    assert opened(place, overwrite=True, finish=False) == "digits-vit-s0"
    assert "starting over" in capsys.readouterr().out
    assert not (place / "digits-vit-s0" / "metrics.json").exists()
    code["model.py"] = "other"
    assert opened(place, overwrite=True) == "digits-vit-s0-2"


def test_one_folder_of_images_is_one_dataset_however_it_is_written(place, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my pets").mkdir()
    (tmp_path / "your pets").mkdir()
    first = opened(place, DATASET="my pets")
    for same in ("my pets/", "./my pets", str(tmp_path / "my pets")):
        assert opened(place, DATASET=same) == first
    assert opened(place, DATASET="your pets") != first
    assert opened(place, DATASET="/moved to/my pets") == first
    assert opened(place, DATASET="/moved to/my pets", data="other") != first


@pytest.mark.parametrize("name", ["/", "../out", "a/b", "a\\b", "..", ".", "", " ", ".hidden",
                                  "a\nb", "a\0b", "\x1b[31m", "x" * 300, "c:d"])  # fmt: skip
def test_a_name_cannot_leave_the_results_folder(place, name):
    with pytest.raises(UserError, match="NAME="):
        opened(place, name, NAME=name)
    assert not place.exists()


@pytest.mark.parametrize("name", ["a/../../b", "x\ny", "y" * 500, "../..", "ü" * 200])
def test_a_name_from_data_becomes_one_folder(place, name):
    made = opened(place, name)
    assert [p.name for p in place.iterdir()] == [made]
    assert opened(place, name) == made


def test_a_file_in_place_of_the_results_folder_is_named(place, code):
    place.parent.mkdir()
    place.touch()
    with pytest.raises(UserError, match=r"RESULTS_DIR='.*train': .*train is a file, not a folder"):
        opened(place)


def test_a_folder_that_cannot_be_written_is_named(place, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(run_folders.tempfile, "mkdtemp", refuse)
    with pytest.raises(UserError, match=r"could not write .*digits-vit-s0: Permission denied"):
        opened(place)


def test_a_file_system_without_locks_is_enough(place, monkeypatch):
    def refuse(_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(run_folders, "_lock_file", refuse)
    assert opened(place, finish=False) == opened(place, finish=False) == "digits-vit-s0"


def test_folders_of_processes_that_were_killed_are_removed(place):
    opened(place, finish=False)
    old, new, file = place / ".old.part", place / ".new.part", place / "digits-vit-s0" / "x.part"
    old.mkdir()
    new.mkdir()
    os.utime(old, (0, time.time() - 3600))
    file.touch()
    nested = place / "digits-vit-s0" / "snapshots" / "x.part"
    nested.parent.mkdir()
    nested.touch()
    opened(place)
    assert not nested.exists()
    assert not old.exists()
    assert new.exists(), "another process may be writing it"
    assert not file.exists()


def test_the_folders_of_a_process_are_reported_in_a_file(place, tmp_path, monkeypatch):
    monkeypatch.setenv(Run.FOLDERS_VARIABLE, str(tmp_path / "folders"))
    opened(place)
    opened(place)
    opened(place, "other")
    lines = (tmp_path / "folders").read_text().splitlines()
    assert lines == [str(place / name) for name in ("digits-vit-s0", "digits-vit-s0", "other")]


def test_damaged_records_are_named(place):
    folder = place / opened(place)
    run = Run(folder)
    with pytest.raises(UserError, match=r"metrics\.json is damaged"):
        run.summary()
    for value in (math.nan, -1, 10**400):
        record = {"test_accuracy": value, "test_accuracy_95": [0, 1], "test_images": 9,
                  "best_epoch": 1, "epochs": 1, "training_seconds": 1}  # fmt: skip
        (folder / "metrics.json").write_text(json.dumps(record))
        with pytest.raises(UserError, match=r"metrics\.json is damaged"):
            run.summary()
    with pytest.raises(UserError, match=r"history\.csv cannot be read: No such file.*--overwrite"):
        run.history()
    (folder / "history.csv").write_text("epoch,loss\n1,x\n")
    with pytest.raises(UserError, match=r"history\.csv is damaged"):
        run.history()
    run.write_history([{"epoch": 1, "loss": 0.5}])
    run.append_history({"epoch": 2, "loss": 0.25})
    assert run.history() == [{"epoch": 1, "loss": 0.5}, {"epoch": 2, "loss": 0.25}]


def test_the_newest_run_is_the_one_that_finished_last(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"make one with python train\.py"):
        Run.newest()
    runs = Path("results", "train")
    for age, name in enumerate(("new", "old")):
        (runs / name).mkdir(parents=True)
        (runs / name / "metrics.json").touch()
        os.utime(runs / name / "metrics.json", (0, 1000 - age))
    (runs / "unfinished").mkdir()
    assert Run.newest() == str(runs / "new")
    assert f"model: {runs / 'new'}, the newest run of train.py" in capsys.readouterr().out


@pytest.fixture
def holder(place, tmp_path):
    """Starts another process that opens a run; at an event, it has it open."""

    def hold(shared=False):
        Run.open(place, "digits-vit-s0", CONSTANTS, FACTS, False, shared=shared)
        event()

    return lambda **kwargs: Process(lambda: hold(**kwargs), tmp_path / "log")


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize("kill", [True, False])
def test_a_run_belongs_to_one_process_until_that_ends(place, holder, kill):
    process = holder()
    assert process.next_event()
    for overwrite in (False, True):
        with pytest.raises(UserError, match=rf"another process \(process id {process.pid}\)"):
            opened(place, overwrite=overwrite)
    if kill:
        os.kill(process.pid, signal.SIGKILL)
    process.go()
    process.finish()
    assert (place / "digits-vit-s0" / ".lock").exists() == kill
    assert opened(place) == "digits-vit-s0"
    run_folders.unlock_all()
    assert not (place / "digits-vit-s0" / ".lock").exists()


def test_a_shared_folder_is_open_to_several_processes(place, holder):
    process = holder(shared=True)
    assert process.next_event()
    ours = Run.open(place, "digits-vit-s0", CONSTANTS, FACTS, False, shared=True)
    assert ours.folder == place / "digits-vit-s0"
    process.go()
    assert process.finish().status == 0


def test_a_sweep_that_is_running_is_not_overwritten(place):
    def shared(overwrite):
        name = "digits-vit-s0"
        return Run.open(place, name, CONSTANTS, FACTS, overwrite, shared=True).folder

    (shared(False) / ".locks").mkdir()
    with (
        FileLock(shared(False) / ".locks" / "trial-0"),
        pytest.raises(UserError, match="in use by another process"),
    ):
        shared(True)
    assert not (shared(True) / ".locks").exists()


@pytest.mark.parametrize(("edited", "line"), [
    ({}, "resume with: python train.py --seed 1"),
    ({"OVERWRITE": True}, "resume with: python train.py --seed 1 --no-overwrite"),
])  # fmt: skip
def test_the_command_that_resumes_never_starts_over(edited, line, monkeypatch):
    words = ["python", "train.py", "--overwrite", "--seed", "1"]
    monkeypatch.setattr(runtime, "_original_command", lambda: words)
    monkeypatch.setattr(constants, "running", constants.RunningScript(edited=edited))
    assert runtime._resume_line() == f"\n{line}"


def test_a_folder_of_windows_is_locked_after_it_is_renamed(place, monkeypatch):
    """Windows neither renames a folder that has an open file nor deletes that file."""
    rename, unlink = os.rename, Path.unlink

    def strict(call, *places):
        opened = {Path(f"/proc/self/fd/{d}").resolve().parent for d in run_folders._locks.values()}
        assert not opened & {Path(places[0]).resolve(), Path(places[0]).resolve().parent}
        return call(*places)

    monkeypatch.setattr(run_folders, "_WINDOWS", True)
    monkeypatch.setattr(run_folders.os, "rename", lambda *places: strict(rename, *places))
    assert opened(place) == "digits-vit-s0"
    monkeypatch.setattr(Path, "unlink", lambda path, **kw: strict(unlink, path) if kw else None)
    assert (place / "digits-vit-s0").resolve() in run_folders._locks
    run_folders.unlock_all()
    assert not run_folders._locks


def test_a_kill_while_the_folder_is_created_leaves_its_name_free(place, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(run_folders.os, "rename", killed)
    with pytest.raises(KeyboardInterrupt):
        opened(place)
    monkeypatch.undo()
    monkeypatch.setattr(runs, "code_hashes", lambda *_: CODE)
    assert opened(place) == "digits-vit-s0"
