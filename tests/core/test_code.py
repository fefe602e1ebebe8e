"""Which code identifies a run: edits that matter, edits that do not, and files that are found."""

import shutil
import sys
from pathlib import Path

import pytest

from lab.core import code, constants

ROOT = Path(code.__file__).parents[2]


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project whose script imports one package directly and one inside a function."""
    files = {
        "model.py": "class Model:\n    pass\n",
        "script.py": "import other\nfrom lab.a import f\nWIDTH: int = 3\nTABLE = {1: 2}\n",
        "other.py": "import torch\n",
        "lab/__init__.py": "",
        "lab/a/__init__.py": "from lab.a.x import f\n",
        "lab/a/x.py": "def f():\n    from lab.b import y\n    return y\n",
        "lab/a/lazy.py": "",
        "lab/b/y.py": "Y = 1\n",
        "lab/c/z.py": "not imported\n",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(code, "_ROOT", tmp_path)
    monkeypatch.setattr(constants, "running", constants.RunningScript())
    return tmp_path


def test_imported_files_of_the_project_count(project):
    assert list(code.code_hashes(project / "script.py")) == [
        "lab/a/__init__.py", "lab/a/lazy.py", "lab/a/x.py", "lab/b/y.py", "model.py", "other.py",
        "script.py",
    ]  # fmt: skip


def test_the_hash_is_that_of_the_model_that_was_imported(project, monkeypatch):
    """A student edits model.py while the seeds of a series train, which use the old one."""
    path = project / "model.py"
    path.write_text("".join(f"class {name}:\n    pass\n" for name in code._NEEDED))
    monkeypatch.setitem(sys.modules, "model", None)
    monkeypatch.setattr(sys, "path", sys.path[:])
    code._import_file(path)
    imported = code.code_hashes()["model.py"]
    path.write_text(path.read_text() + "edited = True\n")
    assert code.code_hashes()["model.py"] == imported
    code._import_file(path)
    assert code.code_hashes()["model.py"] != imported


@pytest.mark.parametrize("line", ["from vit import f", "import vit", "from vit.attention import g"])
def test_packages_of_the_users_own_count(project, line):
    files = {"__init__.py": "from .attention import f", "attention.py": "from . import heads",
             "heads.py": "", "unused.py": ""}  # fmt: skip
    for name, text in files.items():
        (project / "vit").mkdir(exist_ok=True)
        (project / "vit" / name).write_text(text)
    (project / "model.py").write_text(line)
    expected = {"model.py", "vit/attention.py", "vit/heads.py"}
    assert set(code.code_hashes()) - {"vit/__init__.py"} == expected


BEFORE = '''"""Text."""
class A:
    """More."""
    def f(self, x, y=None):
        """Text."""
        return [x, "a", f"{x:.2f}", 1]
'''


@pytest.mark.parametrize(("old", "new"), [
    ("return", "# a comment\n        return"), ("x, y=None", "x , y = None"), ('"a"', "'a'"),
    ('"""Text."""', '"""Other."""'), ('"""More."""\n', "\n"), ("[x", "[\n            x"),
    ("return", "return("), ('        """Text."""\n', ""),
])  # fmt: skip
def test_comments_docstrings_and_formatting_do_not_count(project, old, new):
    after = BEFORE.replace(old, new)
    if new == "return(":
        after = after.replace("1]", "1])")
    assert after != BEFORE
    hashes = []
    for text in (BEFORE, after):
        (project / "model.py").write_text(text)
        hashes.append(code.code_hashes()["model.py"])
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize(("old", "new"), [
    ("1]", "1.0]"), ("1]", "True]"), ("1]", "'1']"), ("y=None", "*, y=None"), ("y=None", "y=0"),
    (".2f", ".3f"), ("x, y", "y, x"), ("[x,", "['a',"), ("return", "pass; return"),
    ("class A", "class A(object)"), ('x, "a"', '"a", x'), ("return [", "return None, ["),
    ("y=None", "*y"), ("y=None", "**y"), ("def f", "async def f"),
])  # fmt: skip
def test_every_other_edit_counts(project, old, new):
    hashes = []
    for text in (BEFORE, BEFORE.replace(old, new, 1)):
        (project / "model.py").write_text(text)
        hashes.append(code.code_hashes()["model.py"])
    assert hashes[0] != hashes[1]


def test_constants_of_the_running_script_do_not_count(project, monkeypatch):
    script = project / "script.py"
    running = constants.RunningScript((script,), frozenset({"WIDTH"}))
    monkeypatch.setattr(constants, "running", running)
    before, text = code.code_hashes(), script.read_text()
    script.write_text(text.replace("WIDTH: int = 3", "WIDTH = 5"))
    assert code.code_hashes() == before
    script.write_text(text.replace("{1: 2}", "{1: 3}"))
    assert code.code_hashes() != before


def test_hashes_are_the_same_in_every_process_and_version():
    source = b"def f(x: int = 1) -> None:\n    return None\n"
    assert code._parsed(source, frozenset())[0] == "1d5374387e7ff97a"


def test_attention_edited_in_model_py_is_noticed(project):
    shutil.copy(ROOT / "model.py", project)
    before = code.code_hashes()["model.py"]
    text = (project / "model.py").read_text()
    assert ".softmax(" in text
    (project / "model.py").write_text(text.replace(".softmax(", ".log_softmax(", 1))
    assert code.code_hashes()["model.py"] != before
