"""Files that outlive a run: weights as safetensors, the state that resumes, each written whole.

Nothing here unpickles code: weights are safetensors, a state is read with `weights_only=True`.
"""

import csv
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.core.errors import UserError
from lab.core.runtime import is_main_process


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file so that a kill at any moment leaves the old one or the new, never a part."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=".part")
    os.close(handle)
    scratch = Path(name)
    try:
        write(scratch)
        scratch.chmod(0o644)  # mkstemp's files are private
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows with equal keys as CSV with a header; no rows make an empty file."""
    with open(path, "w", newline="", encoding="utf-8", errors="backslashreplace") as file:
        if rows:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def save_weights(path: Path, state: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Weights as safetensors; `header` is JSON, such as the model's config and class names.

    Only the main process writes.
    """
    if not is_main_process():
        return
    state = {name: value.detach().cpu().contiguous() for name, value in state.items()}
    metadata = {"vit-lab": json.dumps(header)}
    write_atomically(path, lambda scratch: save_file(state, scratch, metadata=metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Weights and header as `save_weights` wrote them.

    Raises: UserError, for a file that is missing, broken, or not of this project.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), json.loads(metadata["vit-lab"])
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a finished run has best.safetensors") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error
    except KeyError as error:
        raise UserError(f"{path} has no header of this project; was it written by it?") from error


def load_strict(model: nn.Module, state: dict[str, Tensor], origin: Path | str) -> None:
    """`load_state_dict`, but what does not fit is named for a reader."""
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - state.keys()]
    problems += [f"unknown {name}" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} is {tuple(state[name].shape)} but the model's is {tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if wanted[name].shape != state[name].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise UserError(f"{origin} is of another architecture ({len(problems)} keys):\n  {shown}")
    model.load_state_dict(state)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Everything that a run needs to resume; only the main process writes."""
    if is_main_process():
        write_atomically(path, lambda scratch: torch.save(state, scratch))


def load_state(path: Path) -> dict[str, Any]:
    """What `save_state` wrote, on the CPU.

    Raises: UserError, for a file that cannot be read.
    """
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a broken file
        raise UserError(
            f"{path} cannot be read ({str(error).splitlines()[0]}); start over with --overwrite"
        ) from error
