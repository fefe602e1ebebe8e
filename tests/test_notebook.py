"""lab.ipynb: its cells call the scripts."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")


def code_cells():
    notebook = nbformat.read(ROOT / "lab.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook, [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_cells_are_python_and_call_scripts_that_exist():
    _, cells = code_cells()
    scripts = set()
    for source in cells:
        scripts |= set(re.findall(r"\{sys\.executable\} (\w+\.py)", source))
        # Lines for the shell and IPython are not Python.
        ast.parse(re.sub(r"^( *)[!%].*$", r"\1pass", source, flags=re.M))
    assert scripts == {"train.py", "finetune.py", "attention_viz.py"}
    assert all((ROOT / script).exists() for script in scripts)
