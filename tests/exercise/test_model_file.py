"""MODEL_FILE: every process uses a student's file, and mistakes are sentences."""

import importlib
import multiprocessing
import re
import sys

import pytest

from lab.core import UserError, code, constants
from tests.events import HANG_SECONDS
from tests.exercise.conftest import ROOT, STUDENT, pasted


def test_spawned_processes_use_the_file(tmp_path, monkeypatch):
    file, script, used = (tmp_path / name for name in ("mine.py", "script.py", "used.txt"))
    file.write_text(pasted(STUDENT), encoding="utf-8")
    script.write_text('MODEL_FILE: str | None = "another.py"\n', encoding="utf-8")
    (tmp_path / "writes_class.py").write_text(
        "from lab.attention import views\n"  # as in share.py, before lab.models
        "from lab.models import registry\n"
        "def write(path):\n"
        "    path.write_text(registry.VisionTransformer.__init__.__code__.co_filename)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(script), f"--model-file={file}"])
    write = importlib.import_module("writes_class").write
    process = multiprocessing.get_context("spawn").Process(target=write, args=(used,))
    process.start()
    process.join(HANG_SECONDS)
    assert process.exitcode == 0
    assert used.read_text() == str(file)


@pytest.mark.parametrize(("source", "says"), [
    ("class A(:\n", r"mine.py, line 1: syntax error"),
    ("\nimport no_such_module\n", r"mine.py, line 2: ModuleNotFoundError"),
    ("x = 1\n", r"does not define ConfigError, DropPath"),
])  # fmt: skip
def test_a_file_that_cannot_be_used_is_a_sentence(tmp_path, source, says):
    file = tmp_path / "mine.py"
    file.write_text(source, encoding="utf-8")
    with pytest.raises(UserError, match=says):
        code._import_file(file)


@pytest.mark.parametrize("name", ["nothing.py", "model.txt"])
def test_a_path_that_is_no_python_file_is_a_sentence(tmp_path, name):
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(UserError, match="is not a Python file"):
        code._import_file(tmp_path / name)


def test_a_process_that_has_imported_another_model_refuses_the_file(tmp_path, monkeypatch):
    running = constants.RunningScript(model_file=str(tmp_path / "mine.py"))
    monkeypatch.setattr(constants, "running", running)
    with pytest.raises(UserError, match="Start the script by itself"):
        code.code_hashes()


def test_everything_that_the_lab_imports_from_model_is_required():
    imported = set()
    for path in (ROOT / "lab").rglob("*.py"):
        for names in re.findall(r"^from model import (.+)$", path.read_text("utf-8"), re.M):
            imported |= {name.strip() for name in names.split(",")}
    assert imported == set(code._NEEDED)


@pytest.mark.parametrize(("argv", "value"), [
    ([], "a.py"), (["--model-file", "b.py"], "b.py"), (["--model-file=c.py"], "c.py"),
    (["--model-file", "none"], None), (["--model-file"], None),
])  # fmt: skip
def test_a_constant_is_read_before_the_script_assigns_it(tmp_path, monkeypatch, argv, value):
    script = tmp_path / "script.py"
    script.write_text('MODEL_FILE: str | None = "a.py"\n')
    monkeypatch.setattr(sys, "argv", [str(script), *argv])
    assert constants.early_value("MODEL_FILE") == value
    assert constants.early_value("OTHER") is None
