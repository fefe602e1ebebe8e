"""make lab: each part once, one line per part, and resuming where it stopped."""

import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import lab.__main__ as whole
from tests.events import Events

ROOT = Path(whole.__file__).resolve().parents[1]

SCRIPT = """
import os, pathlib, sys
name = sys.argv[1]
count = pathlib.Path("results", name)
count.write_text(count.read_text() + "x" if count.exists() else "x")
if name == "wrong" and not pathlib.Path("fixed").exists():
    sys.exit("error: it is not right yet")
print("chatter")
run = pathlib.Path("results", "train", name)
run.mkdir(parents=True, exist_ok=True)
(run / "metrics.json").write_text('{"test_accuracy": 0.12345}')
with open(os.environ["VIT_LAB_RUN_FOLDERS"], "a") as folders:
    print(run, file=folders)
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A lab of three parts in a folder of its own, the second of which fails until it is fixed."""
    (tmp_path / "part.py").write_text(SCRIPT)
    monkeypatch.setattr(whole, "ROOT", tmp_path)
    monkeypatch.setattr(whole, "LOG", tmp_path / "results" / "lab.log")
    monkeypatch.setattr(whole, "DONE", tmp_path / "results" / "lab.json")
    commands = {"first": "part.py one", "second": "part.py wrong", "third": "part.py report"}
    parts = [whole.Part(title, command, 1) for title, command in commands.items()]
    monkeypatch.setattr(whole, "PARTS", parts)
    return tmp_path


def runs(place, name):
    path = place / "results" / name
    return len(path.read_text()) if path.exists() else 0


@pytest.mark.parametrize(("words", "status"), [(["--help"], 0), (["--epochs", "1"], 2)])
def test_the_lab_has_no_flags(words, status, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lab", *words])
    monkeypatch.setattr(subprocess, "Popen", None)  # so that no part can start
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(ROOT / "lab" / "__main__.py"), run_name="__main__")
    assert end.value.code == status
    out, err = capsys.readouterr()
    assert ("Runs the whole lab" in out) if status == 0 else ("unrecognized" in err)


def test_a_part_that_fails_is_named_and_the_lab_resumes_there(place, capsys):
    with pytest.raises(SystemExit) as stopped:
        whole.main()
    out, err = capsys.readouterr()
    assert stopped.value.code == 1
    assert "error: it is not right yet" in out
    assert "stopped in second" in err
    assert [runs(place, name) for name in ("one", "wrong", "report")] == [1, 1, 0]
    (place / "fixed").touch()
    whole.main()
    lines = capsys.readouterr().out.splitlines()
    assert [runs(place, name) for name in ("one", "wrong", "report")] == [1, 2, 1]
    assert lines[1].startswith("1/3  first")
    assert lines[1].endswith("already finished")
    assert "test accuracy 12.35 %" in lines[2]
    assert lines[-1].endswith("Open results/report.html")
    assert len(lines) == 8  # a heading, a line per part, the time, a summary, the end
    assert "chatter" in whole.LOG.read_text()


def test_only_the_report_is_written_again(place):
    (place / "fixed").touch()
    whole.main()
    whole.main()
    assert [runs(place, name) for name in ("one", "wrong", "report")] == [1, 1, 2]


def test_changed_code_and_deleted_results_are_repeated(place):
    (place / "fixed").touch()
    whole.main()
    (place / "results" / "train" / "one" / "metrics.json").unlink()
    whole.main()
    assert [runs(place, name) for name in ("one", "wrong")] == [2, 1]
    (place / "part.py").write_text(f"{SCRIPT}\n# a comment\n")
    whole.main()
    assert [runs(place, name) for name in ("one", "wrong")] == [2, 1]
    (place / "part.py").write_text(f"{SCRIPT}\nprint('other code')\n")
    whole.main()
    assert [runs(place, name) for name in ("one", "wrong")] == [3, 2]


def test_the_parts_are_scripts_that_exist_and_end_with_a_shared_model():
    words = [part.command for part in whole.PARTS]
    assert all((ROOT / line.split()[0]).is_file() for line in words)
    assert words[-3:] == ["report.py", "predict.py", "share.py"]


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
def test_ctrl_c_stops_the_part_and_says_how_to_resume(place):
    """As the terminal sends it: to the lab and to the script that it runs."""
    begun = Events(place / "begun")
    (place / "part.py").write_text(
        "import pathlib, signal\npathlib.Path('begun').write_text('.')\nsignal.pause()\n"
    )
    # A test started in the background of a shell would inherit that Ctrl-C is ignored.
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        f"import lab.__main__ as w, pathlib; w.ROOT = pathlib.Path({str(place)!r});"
        "w.LOG = w.ROOT / 'results/lab.log'; w.DONE = w.ROOT / 'results/lab.json';"
        "w.PARTS = [w.Part('first', 'part.py one', 1)]; w.main()"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True,
                               start_new_session=True, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE)  # fmt: skip
    begun.next()
    os.killpg(process.pid, signal.SIGINT)
    _, err = process.communicate()
    assert process.returncode == 130
    assert "stopped in first; make lab, or python -m lab, resumes it" in err


@pytest.mark.skipif(sys.platform == "win32", reason="signals of POSIX")
@pytest.mark.parametrize(
    "script", sorted(path.name for path in ROOT.glob("*.py") if path.name != "model.py")
)
def test_ctrl_c_while_torch_is_imported_prints_no_traceback(script, tmp_path):
    """A package of that name stands in for torch, and receives Ctrl-C in its first line."""
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")
    done = subprocess.run(
        [sys.executable, script], cwd=ROOT, capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.stderr == "\ninterrupted\n"
    assert done.returncode in (130, -signal.SIGINT)
