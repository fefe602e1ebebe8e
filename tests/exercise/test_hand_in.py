"""A student's way from the hand-out to the grade, with a model in exercise/model.py."""

import contextlib
import csv
import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import zipfile

import pytest

from exercise import POINTS
from lab.core import runtime
from lab.exercise.grading import grade
from lab.exercise.handout import hand_out
from lab.exercise.parts import PARTS
from lab.exercise.processes import Job
from tests.events import HANG_SECONDS
from tests.exercise.conftest import ROOT, STUDENT, WEIGHTS, pasted

OWN = ("--model-file", "exercise/model.py")
TRAIN = ("train.py", *OWN, "--dataset", "digits", "--embed-dim", "16", "--depth", "1",
         "--num-heads", "2", "--epochs", "2")  # fmt: skip
DRAW, PREDICT = ("--num-images", "2"), ("--images", "digits")
LAUNCHED = "tests/training/launched.py"  # runs several scripts in one process, which saves time


def start(folder, *words, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finished(process):
    """Status, stdout, stderr; the process and its children are gone afterwards, hung or not."""
    try:
        out, err = process.communicate(timeout=HANG_SECONDS)
        return process.returncode, out, err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """The hand-out with the solution pasted in, a run that was stopped and resumed, and a zip.

    Returns: the folder, the run's folder, what the stopped process and the last one printed.
    """
    folder = tmp_path_factory.mktemp("student") / "lab"
    hand_out(folder)
    (folder / "exercise" / "model.py").write_text(pasted(STUDENT), encoding="utf-8")
    shutil.copy(ROOT / "exercise" / "steps.py", folder / "exercise" / "steps.py")
    (folder / LAUNCHED).parent.mkdir(parents=True)
    shutil.copy(ROOT / LAUNCHED, folder / LAUNCHED)
    process = start(folder, LAUNCHED, *TRAIN, HOLD=str(folder / "signaled"))
    assert "held\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGTERM)
    _, _, stopped = finished(process)
    (run,) = (folder / "results" / "train").iterdir()
    own = (*OWN, "--model", f"{run.relative_to(folder)}")
    draw, predict = ("attention_viz.py", *own, *DRAW), ("predict.py", *own, *PREDICT)
    scripts = (("exercise.py", *OWN), TRAIN, draw, predict, ("report.py", "--hand-in"))
    words = [word for script in scripts for word in (*script, "+")]
    status, out, err = finished(start(folder, LAUNCHED, *words))
    assert status == 0, err
    return folder, run, stopped, out


def test_the_solution_passes_in_the_hand_out(solved):
    assert "1.00 of 1.00" in solved[3]


def test_a_run_with_a_students_model_is_resumed(solved):
    _, run, stopped, out = solved
    assert "stopped and saved at epoch 2" in stopped
    assert f"resume with: python {' '.join(TRAIN)}" in stopped
    assert "resuming at epoch 2" in out
    assert (run / "metrics.json").is_file()


def test_the_run_records_the_students_file_and_its_hash(solved):
    folder, run, _, _ = solved
    config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    hashes = {
        path: runtime.source_hash((folder / path).read_bytes())
        for path in ("model.py", "exercise/model.py")
    }
    assert config["constants"]["MODEL_FILE"] == "exercise/model.py"
    assert config["code"]["model.py"] == hashes["exercise/model.py"] != hashes["model.py"]


@pytest.mark.parametrize(("script", "flags", "file_name"), [
    ("attention_viz.py", DRAW, "attention.html"), ("predict.py", PREDICT, "predictions.csv"),
])  # fmt: skip
def test_other_scripts_need_the_file_of_the_run(
    solved, monkeypatch, capsys, script, flags, file_name
):
    folder, run, _, _ = solved
    assert list(folder.glob(f"results/{script[:-3]}/*/{file_name}"))  # written with the flag
    monkeypatch.setattr(sys, "argv", [script, "--model", str(run), *flags])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    assert end.value.code == 2
    assert "add --model-file exercise/model.py" in capsys.readouterr().err


def test_the_hand_in_gets_full_points_and_an_edited_model_is_noticed(solved, tmp_path):
    folder, run, _, _ = solved
    shutil.copy(folder / "results" / "hand-in.zip", tmp_path / "ada.zip")
    with (
        zipfile.ZipFile(tmp_path / "ada.zip") as original,
        zipfile.ZipFile(tmp_path / "eve.zip", "w") as edited,
    ):
        for name in original.namelist():
            content = original.read(name)
            if name == "exercise/model.py":
                content = content.replace(b"F.gelu(h)", b"F.relu(h)")
            edited.writestr(name, content)
    points = {}
    job = Job(ROOT, None, tuple(PARTS), 1, WEIGHTS, 10.0, 1000)
    summary = grade(tmp_path, POINTS, job, lambda name, total: points.update({name: total}))
    assert points["ada"] == pytest.approx(1)
    assert points["eve"] < 1
    runs = re.findall(r"^\| (ada|eve) \| (\d of \d) \|", summary.read_text("utf-8"), re.M)
    assert runs == [("ada", "3 of 3"), ("eve", "0 of 3")]  # one from each of three scripts
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8-sig") as file:
        remarks = {(row["student"], row["part"]): row["diagnosis"] for row in csv.DictReader(file)}
    name = f"run results/train/{run.name}"
    assert ("ada", name) not in remarks
    assert "made with a different model.py" in remarks["eve", name]
