"""Comparing modes: one process each, results through files, and interruptions between modes."""

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

SCRIPT = '''
"""A script with the modes of finetune.py and nothing to train."""
import json, os, signal, sys
from pathlib import Path
from typing import Literal

MODE: Literal["a", "b", "c", "all"] = "all"
TOP_K: int = 2
NAME: str | None = None
HOLD: Literal["import", "training", "no"] = "no"

def pretend():
    """One mode, without the seconds that the imports of a training script take."""
    flags = dict(word[2:].split("=", 1) for word in sys.argv[1:] if "=" in word)
    mode, blocks = flags["mode"], flags.get("top-k", "")
    named = flags["name"] != "none"
    folder = Path("results", flags["name"] if named else f"data-{mode}{blocks}-s0")
    with open(os.environ["VIT_LAB_RUN_FOLDERS"], "a") as file:
        file.write(f"{folder}\\n")
    print("some output that looks like results/x/curves.png")
    if (folder / "metrics.json").exists():
        print("already finished")
        return
    folder.mkdir(parents=True, exist_ok=True)
    numbers = {"TOP_K": int(blocks or 0), "LAYER_DECAY": 1.0, "LORA_RANK": 8}
    (folder / "config.json").write_text(json.dumps({
        "command": " ".join(sys.argv), "constants": {"MODE": mode, **numbers},
        "model": {"trainable_parameters": 7}}))
    (folder / "metrics.json").write_text(json.dumps({
        "test_accuracy": 0.5, "test_accuracy_95": [0.4, 0.6], "training_seconds": 1.0,
        "peak_memory_mb": 3, "test_images": 10}))

def hold():
    """A mode that is interrupted as a training is."""
    arrived, arriving = os.pipe()
    os.set_blocking(arriving, False)
    signal.set_wakeup_fd(arriving)
    with runtime.handle_signals() as stop:
        print("held", flush=True)
        os.read(arrived, 1)
    raise runtime.Stopped(stop[0], "epoch 1")

flags = {word for word in sys.argv[1:] if not word.startswith("--hold")}
held = "--mode=b" in flags and not {"--hold=import", "--hold=training"}.isdisjoint(sys.argv)
if not held and any(flag.startswith("--mode=") for flag in flags):
    sys.argv[1:] = [word for word in sys.argv[1:] if not word.startswith("--hold")]
    pretend()
    sys.exit()

import lab  # as all scripts do before their slow imports
if "--mode=b" in sys.argv and "--hold=import" in sys.argv:
    print("held", flush=True)
    signal.pause()

from lab.core import constants, runtime

def main():
    constants.override(sys.modules[__name__])
    if MODE != "all":
        hold()
    from lab.finetuning import compare_modes
    modes = {"a": {"MODE": "a"}, "b1": {"MODE": "b", "TOP_K": 1}, "c": {"MODE": "c"}}
    compare_modes(modes, NAME, Path("results"))

if __name__ == "__main__":
    runtime.run_script(main)
'''


@pytest.fixture
def start(tmp_path):
    """Starts the script above in an empty folder."""
    (tmp_path / "script.py").write_text(SCRIPT)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    started = []

    def start(*words):
        command = [sys.executable, "script.py", *words]
        process = subprocess.Popen(command, cwd=tmp_path, env=environment, text=True,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()


def test_modes_have_names_and_commands_of_their_own(start, tmp_path):
    out, err = start("--name", "mine").communicate()
    assert err == ""
    results = tmp_path / "results"
    assert {path.name for path in results.iterdir()} == {
        "mine-a", "mine-b1", "mine-c", "mine-modes.md", "mine-modes.png",
    }  # fmt: skip
    table = (results / "mine-modes.md").read_text()
    assert len(re.findall(r"\| 7 \| 50.0 % \(40.0 to 60.0\) \| 1 s \| 3 MB \|", table)) == 3
    assert table in out
    assert out.splitlines()[-1] == "results/mine-modes.png"
    command = json.loads((results / "mine-b1" / "config.json").read_text())["command"]
    assert "--mode=b --top-k=1 --name=mine-b1" in command


def interrupt(start, tmp_path, hold, number):
    """Interrupts the second of three modes; returns the metrics of the first."""
    process = start(f"--hold={hold}")
    assert "held\n" in iter(process.stdout.readline, "")
    process.send_signal(number)
    _, err = process.communicate()
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    *_, stopped, advice = err.splitlines()
    assert stopped == "stopped and saved at mode b1, 2 of 3"
    assert advice.endswith(f": python script.py --hold={hold}")
    assert not (tmp_path / "results" / "data-c-s0").exists()
    return tmp_path / "results" / "data-a-s0" / "metrics.json"


@pytest.mark.parametrize("hold", ["import", "training"])
def test_ctrl_c_ends_a_comparison_without_traceback(hold, start, tmp_path):
    assert interrupt(start, tmp_path, hold, signal.SIGINT).exists()


def test_a_terminated_comparison_resumes_at_the_mode_that_it_had_reached(start, tmp_path):
    first = interrupt(start, tmp_path, "training", signal.SIGTERM)
    before = first.stat().st_mtime_ns
    out, err = start("--hold=no").communicate()
    assert err == ""
    assert "already finished" in out
    assert first.stat().st_mtime_ns == before
    assert out.splitlines()[-1] == "results/data-s0-modes.png"


def test_mode_that_fails_ends_the_comparison_with_its_status(start, tmp_path):
    (tmp_path / "results").mkdir()
    text = SCRIPT.replace("    pretend()\n", "    sys.exit(3)\n")
    (tmp_path / "script.py").write_text(text)
    process = start()
    out, err = process.communicate()
    assert process.returncode == 3
    assert "Traceback" not in err
    assert "2 of 3" not in out
