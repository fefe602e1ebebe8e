"""lab.ipynb: its cells call the scripts, and they run on a CPU with embedded data."""

import ast
import re
import shutil
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


def test_notebook_runs_on_a_cpu(tmp_path, monkeypatch):
    """In a copy of the project, so that the results of this checkout are not touched."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    for name in ("lab", "weights"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for path in [*ROOT.glob("*.py")]:
        shutil.copy(path, tmp_path)
    (tmp_path / "requirements.txt").write_text("")  # everything is installed
    monkeypatch.setenv("VIT_LAB_FLAGS", "--dataset digits --epochs 1")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.setenv("JUPYTER_PATH", "")
    notebook, _ = code_cells()
    client = nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}
    )
    client.execute()
    printed = "".join(
        output.get("text", "") for cell in notebook.cells for output in cell.get("outputs", [])
    )
    assert "error:" not in printed
    assert list((tmp_path / "results" / "train").glob("*/metrics.json"))
    assert list((tmp_path / "results" / "finetune").glob("*/metrics.json"))
    assert list((tmp_path / "results" / "attention_viz").glob("*/attention.html"))
