"""Reads and writes files safely: records, weights, and the state from which training resumes.

Each file is written completely or not at all. Reading one never executes code: weights are
safetensors files, and a training state is read with `weights_only=True`.
"""

import csv
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lab.core.errors import UserError
from lab.core.runtime import is_main_process

PARTIAL = ".part"  # suffix of a file that is still being written


@contextmanager
def explain_write_errors(path: Path) -> Iterator[None]:
    """Turns a failure to write `path`, such as a full disk, into a UserError."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        # torch.save reports a full disk as a RuntimeError from its C++ file writer.
        if isinstance(error, RuntimeError):
            if not any(word in str(error) for word in ("inline_container", "iostream")):
                raise
            reason = "the file was truncated; the disk may be full"
        else:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
        is_denied = getattr(error, "errno", None) in (errno.EACCES, errno.EPERM, errno.EEXIST)
        raise UserError(
            f"could not write {path}: {reason}. {'' if is_denied else _free_space(path)}"
            "Everything saved so far is intact. "
            + ("" if is_denied else "Free some space and run the same command to resume, or ")
            + ("Choose" if is_denied else "choose")
            + " another folder (RESULTS_DIR; DATA_DIR for downloads and caches)."
        ) from error


def _free_space(path: Path) -> str:
    folder = next((p for p in path.absolute().parents if p.is_dir()), None)
    try:
        free = shutil.disk_usage(folder).free if folder else None
    except OSError:
        free = None
    return "" if free is None else f"{free / 1e6:,.0f} MB are free on that disk. "


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Writes a file atomically: if the process is killed, the old or the new file exists.

    Args:
        path: the file.
        write: writes the whole content to the path that it gets.

    Raises: UserError, if the file cannot be written; the old file is then intact.
    """
    with explain_write_errors(path):
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=path.name, suffix=PARTIAL)
        os.close(handle)
        scratch = Path(name)
        try:
            write(scratch)
            scratch.chmod(0o644)  # mkstemp's files are private
            os.replace(scratch, path)
        finally:
            scratch.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Writes JSON, indented. Raises: UserError, if the file cannot be written."""
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_atomically(path, lambda scratch: scratch.write_text(text, encoding="utf-8"))


def write_rows(path: Path, rows: list[dict[str, Any]], encoding: str = "utf-8") -> None:
    """Writes a CSV file with the keys of the first row as its header; not atomic by itself."""
    with open(path, "w", newline="", encoding=encoding, errors="backslashreplace") as file:
        if rows:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)


def text_hash(path: Path) -> str:
    """SHA-256 of a text file; line endings, which git changes on Windows, do not count."""
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n")).hexdigest()


@contextmanager
def explain_read_errors(path: Path) -> Iterator[None]:
    """Turns a failure to read a run's record, or to understand its content, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be read: {error.strerror}; --overwrite repeats the run"
        ) from error
    except (
        ValueError, TypeError, AttributeError, KeyError, OverflowError, RecursionError, csv.Error
    ) as error:  # fmt: skip
        raise UserError(f"{path} is damaged; --overwrite repeats the run") from error


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object of a run.

    Raises: UserError, for a file that is missing, damaged, or not an object.
    """
    with explain_read_errors(path):
        content = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(content, dict):
            raise ValueError(content)
        return content


def save_weights(path: Path, state: dict[str, Tensor], header: dict[str, Any]) -> None:
    """Writes weights as safetensors; only the main process does.

    Args:
        path: the file.
        state: tensors by name, on any device.
        header: JSON, such as the model's config and class names.

    Raises: UserError, if the file cannot be written.
    """
    if not is_main_process():
        return
    copies: dict[str, Tensor] = {}
    storages: set[int] = set()
    for name, value in state.items():
        value = value.detach().cpu().contiguous()
        if value.untyped_storage().data_ptr() in storages:  # safetensors refuses shared memory
            value = value.clone()
        storages.add(value.untyped_storage().data_ptr())
        copies[name] = value
    metadata = {"vit-lab": json.dumps(header)}
    write_atomically(path, lambda scratch: save_file(copies, scratch, metadata=metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Reads weights and header as `save_weights` wrote them.

    Raises: UserError, for a file that is missing, damaged, or not written by `save_weights`.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        return load_file(path), json.loads(metadata["vit-lab"])
    except FileNotFoundError as error:
        raise UserError(f"{path} does not exist; a finished run has best.safetensors") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except SafetensorError as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})") from error
    except (KeyError, ValueError, RecursionError) as error:
        raise UserError(
            f"{path} has no valid ViT Lab header, so it was not written by this project"
        ) from error


def load_strict(model: nn.Module, state: dict[str, Tensor], origin: Path | str) -> None:
    """`load_state_dict`, with an error message that lists what does not match.

    Args:
        model: receives the weights.
        state: the weights.
        origin: where they come from, for the message.

    Raises: UserError, unless all names and shapes match the model's.
    """
    wanted = model.state_dict()
    problems = [f"missing {name}" for name in wanted.keys() - state.keys()]
    problems += [f"unexpected {name}" for name in state.keys() - wanted.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, but the model expects "
        f"{tuple(wanted[name].shape)}"
        for name in wanted.keys() & state.keys()
        if wanted[name].shape != state[name].shape
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise UserError(
            f"{origin} does not match the model's architecture ({len(problems)} mismatched keys):"
            f"\n  {shown}"
        )
    model.load_state_dict(state)


def save_state(path: Path, state: dict[str, Any]) -> None:
    """Writes everything that a run needs to resume; only the main process does.

    Raises: UserError, if the file cannot be written.
    """
    if is_main_process():
        write_atomically(path, lambda scratch: torch.save(state, scratch))


def load_state(path: Path) -> dict[str, Any]:
    """Reads what `save_state` wrote, to the CPU.

    Raises: UserError, for a file that is damaged or holds anything but tensors and plain values.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(type(state))
    except Exception as error:  # torch raises many exception types for a damaged file
        # Its message would advise weights_only=False, which executes code in the file.
        raise UserError(
            f"{path} cannot be read: it is damaged or was not written by this project, so this run "
            "cannot resume; --overwrite starts it over"
        ) from error
    return state
