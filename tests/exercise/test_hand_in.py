"""A student's way from the hand-out to the grade, with a model in exercise/model.py."""

import contextlib
import csv
import json
import os
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
from tests.exercise.conftest import ROOT, STUDENT, WEIGHTS, pasted

OWN = ("--model-file", "exercise/model.py")
TRAIN = ("train.py", *OWN, "--dataset", "digits", "--embed-dim", "16", "--depth", "1",
         "--num-heads", "2", "--epochs", "2")  # fmt: skip
LAUNCHED = "tests/training/launched.py"  # runs several scripts in one process, which saves time
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")


def start(folder, *words, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *words], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finished(process):
    """Status, stdout, stderr; the process and its children are gone afterwards, hung or not."""
    try:
        out, err = process.communicate(timeout=180)
        return process.returncode, out, err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """The hand-out with the solution pasted in, a run that was stopped and resumed, and a zip.

    Returns: the folder, the run's folder, what the stopped processes and the last one printed.
    """
    folder = tmp_path_factory.mktemp("student") / "lab"
    hand_out(folder)
    (folder / "exercise" / "model.py").write_text(pasted(STUDENT), encoding="utf-8")
    shutil.copy(ROOT / "exercise" / "steps.py", folder / "exercise" / "steps.py")
    (folder / LAUNCHED).parent.mkdir(parents=True)
    shutil.copy(ROOT / LAUNCHED, folder / LAUNCHED)
    process = start(folder, *TORCHRUN, LAUNCHED, *TRAIN, HOLD=str(folder / "signaled"))
    assert "held\n" in iter(process.stdout.readline, "")
    process.send_signal(signal.SIGTERM)
    _, _, stopped = finished(process)
    (run,) = (folder / "results" / "train").iterdir()
    draw = ("attention_viz.py", *OWN, "--model", f"{run.relative_to(folder)}", "--num-images", "2")
    scripts = ("exercise.py", *OWN, "+", *TRAIN, "+", *draw, "+", "report.py", "--hand-in")
    status, out, err = finished(start(folder, LAUNCHED, *scripts))
    assert status == 0, err
    return folder, run, stopped, out


def test_the_solution_passes_in_the_hand_out(solved):
    assert "1.00 of 1.00" in solved[3]


def test_a_run_of_two_processes_with_a_students_model_is_resumed(solved):
    _, run, stopped, out = solved
    assert "stopped and saved at epoch 2" in stopped
    assert f"resume with: python {' '.join((*TORCHRUN, LAUNCHED, *TRAIN))}" in stopped
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


def test_attention_viz_needs_the_file_of_the_run(solved, monkeypatch, capsys):
    folder, run, _, _ = solved
    assert list(folder.glob("results/attention_viz/*/attention.html"))  # drawn with the flag
    monkeypatch.setattr(sys, "argv", ["attention_viz.py", "--model", str(run)])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "attention_viz.py"), run_name="__main__")
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
    rows = summary.read_text(encoding="utf-8").splitlines()
    assert any(row.startswith("| ada | 2 of 2 |") for row in rows)  # training, attention maps
    assert any(row.startswith("| eve | 0 of 2 |") for row in rows)
    with open(tmp_path / "grades.csv", newline="", encoding="utf-8") as file:
        remarks = {(row["student"], row["part"]): row["diagnosis"] for row in csv.DictReader(file)}
    name = f"run results/train/{run.name}"
    assert ("ada", name) not in remarks
    assert "made with another model.py" in remarks["eve", name]
