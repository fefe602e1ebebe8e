"""Files of weights from elsewhere, read without running anything that they might hold."""

import json
import pickle
import re
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lab.errors import UserError


def first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), "") or repr(error)


def read_json(path: Path | None) -> dict[str, Any]:
    """What a JSON file holds; {} for none."""
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path else {}
    except ValueError as error:
        raise UserError(f"{path} is no whole JSON file: {error}") from error


def read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} for other kinds."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path} is not a whole safetensors file ({error})") from error


def read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file or a pickle, which may hold nothing else."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            with torch.serialization.safe_globals([Namespace]):  # timm's own checkpoints have one
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} is refused: it is no pickle of tensors alone{f' ({code[1]})' if code else ''}"
            ", and others could run code. Get these weights as .safetensors"
        ) from error
    except Exception as error:  # a broken file raises many kinds
        raise UserError(f"{path} cannot be read: {first_line(error)}") from error
    for key in ("state_dict", "model"):  # where training scripts put it
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    items = state.items() if isinstance(state, dict) else ()
    wrapped = re.compile(r"^((module|_orig_mod)\.)+")  # DistributedDataParallel, torch.compile
    tensors = {wrapped.sub("", str(k)): v for k, v in items if isinstance(v, Tensor)}
    if not tensors:
        holds = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} holds no tensors by name, but {holds[:200] or 'nothing'}")
    return tensors


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except Exception as error:  # numpy and zipfile raise many kinds for a broken file
        raise UserError(f"{path} is not a whole .npz of arrays: {first_line(error)}") from error
