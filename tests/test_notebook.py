"""lab.ipynb: all cells run, apart from those that need a GPU or a network."""

import ast
import re
from pathlib import Path

import pytest

from tests.events import HANG_SECONDS

ROOT = Path(__file__).resolve().parents[1]
nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")


@pytest.fixture
def notebook():
    notebook = nbformat.read(ROOT / "lab.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def test_cells_are_python_and_call_scripts_that_exist(notebook):
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    scripts = set()
    for source in cells:
        scripts |= set(re.findall(r'"\{sys\.executable\}" (\w+\.py)', source))
        # Lines for the shell and IPython are not Python.
        ast.parse(re.sub(r"^( *)[!%].*$", r"\1pass", source, flags=re.M))
    assert scripts == {"train.py", "finetune.py", "attention_viz.py"}
    assert all((ROOT / script).exists() for script in scripts)


def test_cells_run(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for path in ROOT.iterdir():  # a working folder without results
        if path.name not in ("results", "data") and not path.name.startswith("."):
            (tmp_path / path.name).symlink_to(path)
    monkeypatch.setenv("VIT_LAB_FLAGS", "--dataset digits --epochs 1 --train-fraction 0.1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    skipped = {"gpu", "network"}
    notebook.cells = [c for c in notebook.cells if not skipped & set(c.metadata.get("tags", []))]
    resources = {"metadata": {"path": str(tmp_path)}}
    client = nbclient.NotebookClient(
        notebook, timeout=HANG_SECONDS, startup_timeout=HANG_SECONDS, resources=resources
    )
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    text = "".join(output.get("text", "") for output in outputs)
    assert text.count("test accuracy") == 2, text  # of train.py and finetune.py
    assert "attention.html" in text
    assert sum("image/png" in o.get("data", {}) for o in outputs) == 1
    assert sum("image/jpeg" in o.get("data", {}) for o in outputs) == 1
