"""MODEL_FILE: scripts use a student's model.py, records say so, and mistakes are sentences."""

import json
import re
import subprocess
import sys

import pytest

from lab.core import UserError, code, constants
from tests.exercise.conftest import ROOT, STUDENT, pasted

TINY = ("--embed-dim", "16", "--depth", "1", "--num-heads", "2", "--epochs", "1")


def run(*words, cwd=ROOT):
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A student's file, and the folder of a run that it trained."""
    folder = tmp_path_factory.mktemp("own model")
    file = folder / "mine.py"
    file.write_text(pasted(STUDENT), encoding="utf-8")
    done = run(ROOT / "train.py", "--model-file", file, "--results-dir", folder / "train", *TINY)
    assert done.returncode == 0, done.stderr
    (config,) = folder.glob("train/*/config.json")
    return file, config.parent


def test_config_records_the_file_and_its_hash(trained):
    file, folder = trained
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["constants"]["MODEL_FILE"] == str(file)
    assert config["code"]["model.py"] == code.source_hash(file.read_bytes())
    assert config["code"]["model.py"] != code.source_hash((ROOT / "model.py").read_bytes())


@pytest.mark.parametrize(("script", "flags", "file_name"), [
    ("attention_viz.py", ("--num-images", "2"), "attention.html"),
    ("predict.py", ("--images", "digits"), "predictions.csv"),
])  # fmt: skip
def test_other_scripts_need_the_file_of_the_run(script, flags, file_name, trained, tmp_path):
    file, folder = trained
    words = (ROOT / script, "--model", folder, "--results-dir", tmp_path, *flags)
    refused = run(*words)
    assert refused.returncode == 2
    assert f"add --model-file {file}" in refused.stderr
    assert "Traceback" not in refused.stderr
    drawn = run(*words, "--model-file", file)
    assert drawn.returncode == 0, drawn.stderr
    assert list(tmp_path.glob(f"*/{file_name}"))


SCRIPT = """
import multiprocessing
from lab.models import registry
MODEL_FILE: str | None = None

def show():
    print(registry.VisionTransformer.__init__.__code__.co_filename, flush=True)

if __name__ == "__main__":
    show()
    process = multiprocessing.get_context("spawn").Process(target=show)
    process.start()
    process.join()
"""


@pytest.mark.parametrize("how", ["flag", "constant"])
def test_spawned_processes_use_the_file(trained, tmp_path, monkeypatch, how):
    file, _ = trained
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    script = tmp_path / "script.py"
    text = SCRIPT if how == "flag" else SCRIPT.replace("= None", f"= {str(file)!r}")
    script.write_text(text, encoding="utf-8")
    flags = [f"--model-file={file}"] if how == "flag" else []
    assert run(script, *flags).stdout.split("\n") == [str(file), str(file), ""]


@pytest.mark.parametrize(("source", "says"), [
    ("class A(:\n", r"mine.py, line 1: Python cannot read this line"),
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
    running = constants.Running(model_file=str(tmp_path / "mine.py"))
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
