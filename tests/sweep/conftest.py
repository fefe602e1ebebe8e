"""A sweep of fake_training.py, in this process or another one."""

import json
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from lab.sweep import trials

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def command():
    """Makes the command line of a sweep of fake.py."""
    return lambda *words: [str(ROOT / "sweep.py"), "--script", "fake.py", "--name", "s", *words]


@pytest.fixture
def run_sweep(command, monkeypatch):
    """Runs sweep.py in this process. Returns: its exit status, and the content of sweep.json."""

    def run(*words, place=Path("results/sweep")):
        monkeypatch.setattr(sys, "argv", command(*words))
        status = 0
        try:
            runpy.run_path(str(ROOT / "sweep.py"), run_name="__main__")
        except SystemExit as end:
            status = end.code
        return status, json.loads((place / "s" / "sweep.json").read_text())

    monkeypatch.setattr(trials, "POLL_SECONDS", 0.02)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return run


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """A working directory with fake.py. Returns: the folder of the sweep `s`."""
    shutil.copy(Path(__file__).with_name("fake_training.py"), tmp_path / "fake.py")
    monkeypatch.chdir(tmp_path)
    return Path("results/sweep/s")
