"""The hand-out: what is in it, what is not, and that it works."""

import ast
import os
import shutil
import subprocess
import sys
import threading

import pytest

from lab.core import UserError
from lab.exercise.handout import hand_out, skeleton
from lab.exercise.parts import PARTS
from tests.drills.harness import run_fresh
from tests.events import HANG_SECONDS
from tests.exercise.conftest import ROOT

WRITTEN = ("model.py", "exercise/steps.py")


@pytest.fixture(scope="module")
def handed_out(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handed out") / "lab"
    return folder, hand_out(folder)


def test_every_part_is_left_to_write(handed_out):
    _, removed = handed_out
    expected = {
        name if part.is_function else f"{name}.{method}"
        for name, part in PARTS.items()
        for method in part.todo
    }
    assert set(removed) == expected


@pytest.mark.parametrize("name", WRITTEN)
def test_no_statement_of_the_solution_is_left(handed_out, name):
    """No line of a removed body occurs in the files that are about the exercise."""
    folder, removed = handed_out
    files = [folder / "README.md", folder / "exercise.py", *(folder / file for file in WRITTEN)]
    files += (folder / "lab" / "exercise").glob("*.py")
    text = " ".join(" ".join(path.read_text(encoding="utf-8").split()) for path in files)
    removed, given = statements(ROOT / name)
    assert len(removed) >= 5
    assert [s for s in removed - given if s in text] == []


def statements(path):
    """The longer statements of the bodies that the hand-out leaves open, and of all others."""
    found = {True: set(), False: set()}
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        part = PARTS.get(getattr(node, "name", None))
        functions = [node] if part is None or part.is_function else node.body
        for function in functions:
            removed = part is not None and getattr(function, "name", None) in part.todo
            for inner in ast.walk(function):
                if isinstance(inner, ast.Assign | ast.AugAssign | ast.Return):
                    found[removed].add(ast.unparse(inner))
    return {s for s in found[True] if len(s) > 24}, found[False]


def test_files_that_git_does_not_track_stay_out(tmp_path):
    """Such as a teacher's solution, whose name may have umlauts."""
    root = tmp_path / "course" / "lab"
    (root / "exercise").mkdir(parents=True)
    for name in ("model.py", "exercise/steps.py", "exercise/README.md"):
        shutil.copy(ROOT / name, root / name)
    (root / "train.py").touch()
    git("init", "-q", cwd=root.parent)
    (root / "Lösung.py").touch()
    hand_out(tmp_path / "before", root)  # git does not track the lab yet
    assert (tmp_path / "before" / "Lösung.py").exists()
    git("add", "lab/model.py", "lab/train.py", "lab/exercise", cwd=root.parent)
    hand_out(tmp_path / "after", root)
    assert (tmp_path / "after" / "train.py").exists()
    assert not (tmp_path / "after" / "Lösung.py").exists()


def git(*words, cwd):
    environment = {**os.environ, "GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_SYSTEM": os.devnull}
    subprocess.run(("git", *words), cwd=cwd, check=True, env=environment)


def docstrings(source):
    """The docstrings of the classes of a file, by name."""
    classes = (node for node in ast.parse(source).body if isinstance(node, ast.ClassDef))
    return {node.name: ast.get_docstring(node) for node in classes}


def test_docstrings_and_hints_stay(handed_out):
    folder, _ = handed_out
    text = (folder / "model.py").read_text(encoding="utf-8")
    original = (ROOT / "model.py").read_text(encoding="utf-8")
    kept = docstrings(text)
    assert kept.pop("TODO")
    assert kept == docstrings(original)
    assert len(kept) > 5
    for hint in (
        "a Conv2d, or a Linear after",
        "activation function from the paper",
        "integer division",
    ):
        assert hint in text
    assert "def init_weights" in text


def test_theory_results_tests_and_history_are_left_out(handed_out):
    folder, _ = handed_out
    names = {path.relative_to(folder).parts[0] for path in folder.rglob("*")}
    assert names.isdisjoint({"theory", "results", "tests", "benchmarks", ".git", ".ci"})
    assert {"train.py", "finetune.py", "exercise.py", "model.py", "lab", "weights"} <= names
    assert (folder / "lab.ipynb").is_file()


def test_first_command_of_the_readme_stops_at_a_todo(handed_out, tmp_path):
    folder, _ = handed_out
    readme = (folder / "README.md").read_text(encoding="utf-8")
    commands = [line.split("#")[0].split()[1:] for line in readme.splitlines()
                if line.startswith("python ")]  # fmt: skip
    assert commands[0] == ["train.py"]
    done = run_fresh(commands[0], folder, tmp_path)
    assert done.status == 2
    assert "VisionTransformer.__init__ is not written yet" in done.output
    assert "Traceback" not in done.output


def test_watch_follows_the_students_file(handed_out, tmp_path):
    """It starts at no points, also checks a file that cannot be imported, and ends at all points.

    In the hand-out, model.py is the student's: nothing may import it before the check.
    """
    folder = tmp_path / "lab"
    shutil.copytree(handed_out[0], folder)
    words = [sys.executable, "-u", "exercise.py", "--watch", "--part", "mlp"]
    with subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True) as process:
        killer = threading.Timer(HANG_SECONDS, process.kill)
        killer.start()
        try:
            read_until(process, "0.00 of 0.13", "report.json")
            (folder / "model.py").write_text("clas MLP:\n    pass\n", encoding="utf-8")
            read_until(process, "syntax error", "report.json")
            shutil.copy(ROOT / "model.py", folder / "model.py")
            read_until(process, "0.13 of 0.13")
        finally:
            killer.cancel()
            process.kill()


def read_until(process, *texts):
    for text in texts:
        for line in process.stdout:
            if text in line:
                break
        else:
            pytest.fail(f"{text!r} did not appear")


def test_a_folder_with_files_is_not_overwritten(tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty"):
        hand_out(tmp_path)


def test_a_hand_out_cannot_be_handed_out(handed_out, tmp_path):
    folder, _ = handed_out
    with pytest.raises(UserError, match="hand-out itself"):
        hand_out(tmp_path / "new", root=folder)


def test_skeleton_follows_changes_of_the_model():
    """Comments and new methods of a class, also in other layouts, do not need markers."""
    source = '''class MLP:
    """Doc."""

    def __init__(
        self,
        config,  # the config
    ):
        # a comment
        super().__init__()
        secret = 1

    def forward(self, x):
        """Docstring."""
        return secret(x)

    def helper(self):
        return 3
'''
    text, removed = skeleton(source, "model.py")
    assert removed == ["MLP.__init__", "MLP.forward"]
    assert "secret" not in text
    assert "a comment" not in text
    assert '"""Docstring."""' in text
    assert "return 3" in text
    ast.parse(text)
