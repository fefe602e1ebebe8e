"""Where pretrained weights come from: a run, a file, a folder, the Hugging Face hub, or timm.

Reading a file never runs code that it may contain. Downloads use huggingface_hub, so HF_HOME,
HF_ENDPOINT and HF_HUB_OFFLINE work as documented there.
"""

import difflib
import json
import pickle
import re
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from lab.core import UserError, runtime
from lab.models.cnn import CNNConfig
from lab.models.registry import (
    TimmConfig,
    config_from_header,
    find_path,
    recorded_constants,
    unknown_architecture,
)
from model import ViTConfig

_WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # file names on the hub, the safe one first
_SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar")
_Get = Callable[..., Path | None]  # the first file with one of these names that exists


@dataclass
class Found:
    """Weights and what came with them."""

    origin: str  # for messages and records
    state: dict[str, Tensor]
    config: ViTConfig | CNNConfig | TimmConfig
    preprocess: dict[str, Any] = field(default_factory=dict)  # timm's names; {}: not known
    classes: list[str] | None = None
    remarks: list[str] = field(default_factory=list)


def find(source: str) -> Found:
    """Reads the weights that a name or path refers to.

    Args:
        source: a run (its folder, or its best.safetensors), a folder with config.json and
            weights, a .safetensors, .pth or Google .npz file, a Hugging Face repository
            (owner/name, or owner/name@revision for a tag, branch or commit), or a timm name.

    Raises: UserError, if they do not exist, cannot be downloaded or cannot be read.
    """
    path = find_path(source)
    if path and path.is_dir():
        return _from_folder(path, source)
    if path and path.is_file():
        return _from_file(path, source)
    similar = _similar(source)
    if similar or source.endswith(_SUFFIXES) or source.startswith((".", "/", "~")):
        hint = f"; did you mean {similar}?" if similar else ""
        raise UserError(f"the weights {source!r}: there is no such file or folder{hint}")
    repository = source.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@[\w./-]+)?", repository):
        return _from_repository(repository, partial(_fetch, repository))
    return _from_timm(source)


# --- Files ---


def _similar(source: str) -> str | None:
    """The file or folder beside a path that does not exist whose name is closest to it."""
    path = Path(source)
    folder = find_path(str(path.parent)) if path.name != source else None
    names = [other.name for other in folder.iterdir()] if folder and folder.is_dir() else []
    close = difflib.get_close_matches(path.name, names, 1, cutoff=0.8)
    return str(path.with_name(close[0])) if close else None


def _read_json(path: Path | None) -> dict[str, Any]:
    """The content of a JSON file; {} for none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path else {}
    except (OSError, ValueError, RecursionError) as error:
        reason = runtime.first_line(error)
        raise UserError(f"{path} is not a complete JSON file: {reason}") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} must contain a JSON object, not {str(content)[:40]}")
    return content


def _read_header(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; {} for other formats."""
    if path.suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, framework="pt") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a complete safetensors file ({error})") from error


def _read_state(path: Path) -> dict[str, Tensor]:
    """Tensors by name from a safetensors file, or from a pickle that contains nothing else."""
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            # Checkpoints of timm's training script contain a Namespace.
            with torch.serialization.safe_globals([Namespace]):
                state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        with path.open("rb") as file:
            if file.read(2)[:1] not in (b"\x80", b"P", b"c", b"(", b"]", b"}"):
                kinds = ", ".join(_SUFFIXES)
                raise UserError(f"{path} is not a file of weights, such as {kinds}") from error
        code = re.search(r"GLOBAL (\S+)", str(error))
        raise UserError(
            f"{path} is refused: a pickle that contains more than tensors"
            f"{f' ({code[1]})' if code else ''} could run code. Get these weights as .safetensors"
        ) from error
    except Exception as error:  # a damaged file raises many exception types
        raise UserError(f"{path} cannot be read: {runtime.first_line(error)}") from error
    for key in ("state_dict", "model"):  # where training scripts put the weights
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    items = state.items() if isinstance(state, dict) else ()
    wrapped = re.compile(r"^((module|_orig_mod)\.)+")  # DistributedDataParallel, torch.compile
    tensors = {wrapped.sub("", str(k)): v for k, v in items if isinstance(v, Tensor)}
    if not tensors:
        content = ", ".join(map(str, state)) if isinstance(state, dict) else type(state).__name__
        raise UserError(f"{path} contains no named tensors, only {content[:200] or 'nothing'}")
    return tensors


@contextmanager
def _explain(what: str) -> Iterator[None]:
    """Turns the many errors that mistyped values cause into a UserError about `what`."""
    try:
        yield
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        reason = runtime.first_line(error)
        raise UserError(f"{what} has a value of a wrong type or size: {reason}") from error


def _from_file(path: Path, origin: str) -> Found:
    """One file: its header, its name or its shapes say what it contains."""
    if path.suffix == ".npz":
        return _from_google(path, origin)
    header = _read_header(path)
    if "vit-lab" in header:
        try:
            content = json.loads(header["vit-lab"])
        except (ValueError, RecursionError) as error:
            reason = runtime.first_line(error)
            raise UserError(f"{origin} has a damaged header: {reason}") from error
        return _from_run(path, origin, content)
    if path.name in _WEIGHTS and (path.parent / "config.json").is_file():
        return _from_folder(path.parent, origin)
    if path.name != "best.safetensors" and recorded_constants(str(path)):
        raise UserError(
            f"{origin} does not describe its model: use the folder of its run, {path.parent}"
        )

    import timm

    state = _read_state(path)
    name = header.get("architecture") or _architecture_in(path.stem)
    if name and timm.is_model(name):
        known = name if name in timm.list_pretrained() else name.split(".")[0]
        cfg = timm.get_pretrained_cfg(known).to_dict()
        remark = (
            f"mean, std and crop are timm's for {known}, the architecture in its name or header"
        )
        return Found(origin, state, TimmConfig(cfg["architecture"]), cfg, remarks=[remark])
    if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"} <= state.keys():
        raise UserError(
            f"the architecture of {origin} is unknown: name the file after it, such as "
            "swin_tiny_patch4_window7_224.safetensors, or give a folder with its config.json"
        )
    from lab.models.conversion import config_of

    with _explain(origin):
        config = config_of(state)
    remark = (
        f"assuming {config.num_heads} heads, the standard for embedding dimension "
        f"{config.embed_dim}"
    )
    return Found(origin, state, config, remarks=[remark])


def _from_run(path: Path, origin: str, content: Any) -> Found:
    """Weights that a script of this project has written, with the content of their header."""
    remarks = _check_model_file(path.parent, origin)
    config = config_from_header(content, origin)
    state = _read_state(path)
    remarks = remarks if isinstance(config, ViTConfig) else []
    return Found(origin, state, config, content["preprocess"], content["classes"], remarks)


def _check_model_file(folder: Path, origin: str) -> list[str]:
    """Compares the model.py of a run with the one in use.

    Another file may have parameters of the same names and shapes, and still compute something else.

    Returns: remarks.
    Raises: UserError, for a run of a student's MODEL_FILE whose classes are not in use now.
    """
    record = folder / "config.json"
    if not record.is_file():  # weights without a run
        return []
    config = _read_json(record)
    constants, code = config.get("constants"), config.get("code")
    file = constants.get("MODEL_FILE") if isinstance(constants, dict) else None
    recorded = code.get("model.py") if isinstance(code, dict) else None
    if isinstance(file, str) and not runtime.uses_model(file, recorded):
        raise UserError(
            f"{origin} was trained with MODEL_FILE={file} and needs the classes of that file: add "
            f"--model-file {file}"
        )
    used = Path(sys.modules["model"].__file__)
    if isinstance(recorded, str) and runtime.source_hash(used.read_bytes()) != recorded:
        return [
            f"{used.name} has changed since {origin} was trained, so its weights may now compute "
            "something else"
        ]
    return []


def _from_google(path: Path, origin: str) -> Found:
    import numpy as np

    from lab.models.conversion import from_google

    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
    except Exception as error:  # many exception types for a damaged file
        reason = runtime.first_line(error)
        raise UserError(f"{path} is not a complete .npz file of arrays: {reason}") from error
    with _explain(origin):
        state, config, unused = from_google(arrays)
    half = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
    return Found(origin, state, config, half, remarks=_unused(unused))


def _unused(names: list[str]) -> list[str]:
    found = ", ".join(names)
    return [f"not loaded, because model.py does not use them: {found}"] if names else []


def _architecture_in(stem: str) -> str | None:
    """The longest timm name, including a tag if there is one, that the file name starts with."""
    import timm

    names = {*timm.list_models(), *timm.list_pretrained()}
    starts = [stem[:end] for end in range(len(stem), 0, -1) if not stem[end : end + 1].isalnum()]
    return next((start for start in starts if start in names), None)


# --- Folders, and repositories on the hub ---


def _from_folder(folder: Path, origin: str) -> Found:
    if (folder / "best.safetensors").is_file():
        return _from_file(folder / "best.safetensors", origin)
    is_described = (folder / "config.json").is_file()
    if is_described and isinstance(_read_json(folder / "config.json").get("constants"), dict):
        others = ("metrics.json", "sweep.json", "study.journal")
        if any((folder / name).exists() for name in others):
            raise UserError(f"{origin} contains records, but no weights (best.safetensors)")
        raise UserError(
            f"{origin} has no weights yet: it was stopped before its first weights were saved. "
            "Resume it, or choose a finished run"
        )
    if not is_described:
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{origin} contains no weights (it contains {there}). It must be a finished run, with "
            "best.safetensors, or contain config.json and model.safetensors as on the hub."
        )

    def local(*names: str) -> Path | None:
        return next((folder / name for name in names if (folder / name).is_file()), None)

    return _from_repository(origin, local)


def _from_repository(origin: str, get: _Get) -> Found:
    """A repository of timm or transformers, on the hub or in a folder."""
    config = _read_json(get("config.json"))
    if not config:
        raise UserError(f"{origin} has no config.json that describes its weights")
    weights = get(*_WEIGHTS)
    if weights is None:
        raise UserError(f"{origin} has neither {' nor '.join(_WEIGHTS)}")
    if "vit_lab" in config:  # written by share.py
        return _from_run(weights, origin, config["vit_lab"])
    state = _read_state(weights)
    if "architecture" in config:
        cfg = config.get("pretrained_cfg") or {}
        with _explain(f"config.json of {origin}"):
            cfg = {**config, **cfg, "num_classes": config.get("num_classes") or 0}
            classes = cfg.get("label_names")
            found = TimmConfig(config["architecture"], config.get("model_args") or {})
        return Found(origin, state, found, cfg, _names(classes))

    from lab.models.conversion import from_processor, from_transformers

    with _explain(f"config.json of {origin}"):
        named, vit, unused = from_transformers(state, config)
        labels = config.get("id2label") or {}
        classes = _names([labels[key] for key in sorted(labels, key=int)])
    given = classes and len(classes) == vit.num_classes and classes[0] != "LABEL_0"
    processor = _read_json(get("preprocessor_config.json"))
    with _explain(f"preprocessor_config.json of {origin}"):
        preprocess = from_processor(processor)
    return Found(origin, named, vit, preprocess, classes if given else None, _unused(unused))


def _names(values: Any) -> list[str] | None:
    """Class names from a config, if they are names."""
    is_list = isinstance(values, list) and all(isinstance(value, str) for value in values)
    return values if is_list else None


def _from_timm(name: str) -> Found:
    """A timm name; its weights are on the hub."""
    import timm

    if not timm.is_model(name):
        raise UserError(
            f"the weights {name!r} are not a file, a folder or a repository, and "
            f"{unknown_architecture(name)}"
        )
    architecture = name.split(".")[0]
    tags = [full for full in timm.list_pretrained() if full.split(".")[0] == architecture]
    if not tags or ("." in name and name not in tags):
        now = timm.models.get_deprecated_models().get(name)
        has = f"its name is now {now}" if now else f"it has: {', '.join(tags) or 'none'}"
        raise UserError(f"timm has no pretrained weights {name!r}; {has}")
    cfg = timm.get_pretrained_cfg(name)
    full = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    if not cfg.hf_hub_id:
        path = f"weights/{full}{Path(str(cfg.url)).suffix}"
        raise UserError(
            f"{full} is not on the hub: download {cfg.url}, save it as {path}, and use {path} "
            f"instead of {name}"
        )
    wanted = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else _WEIGHTS
    weights = _fetch(cfg.hf_hub_id, *wanted)
    if weights is None:
        raise UserError(f"{cfg.hf_hub_id} has neither {' nor '.join(wanted)}")
    return Found(full, _read_state(weights), TimmConfig(cfg.architecture), cfg.to_dict())


def _fetch(repository: str, *names: str) -> Path | None:
    """The first of these files that a hub repository (owner/name or owner/name@revision) has.

    Returns: its path in the cache, or None if the repository has none of them.

    Files in the cache, or recorded there as missing, need no network. The exception is config.json,
    the first file of a repository: it is always requested if the hub can be reached. The response
    tells which commit the revision points to, so files cached for an older commit are not used.

    Raises: UserError, if there is no network, or no such repository.
    """
    from huggingface_hub import constants, hf_hub_download, try_to_load_from_cache
    from huggingface_hub.errors import (
        EntryNotFoundError,
        GatedRepoError,
        HFValidationError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    repository, _, revision = repository.partition("@")
    version = {"revision": revision} if revision else {}
    try:
        cached = {name: try_to_load_from_cache(repository, name, **version) for name in names}
    except HFValidationError as error:
        raise UserError(
            f"there is no folder {repository!r}, and it cannot be the name of a Hugging Face "
            f"repository: {runtime.first_line(error)}"
        ) from error
    if names == ("config.json",):
        cached = dict.fromkeys(names)
    for path in cached.values():
        if isinstance(path, str):
            return Path(path)
    page = f"{constants.ENDPOINT}/{repository}"
    for name in (name for name, known in cached.items() if known is None):
        try:
            return Path(hf_hub_download(repository, name, **version))
        except GatedRepoError as error:
            raise UserError(
                f"{page} is gated: accept its terms there and run `hf auth login`"
            ) from error
        except RevisionNotFoundError as error:
            raise UserError(
                f"{repository} has no revision {revision!r}; {page}/tree/main lists its revisions"
            ) from error
        except RepositoryNotFoundError as error:
            raise UserError(
                f"there is no folder {repository!r}, and {page} does not exist or is private; "
                "`hf auth login` gives access to your own private repositories"
            ) from error
        except Exception as error:  # no network, offline mode, a proxy, no space, ...
            if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
                continue  # the repository has no such file
            folder = f"weights/{repository.split('/')[1]}"
            raise UserError(
                f"{name} of {repository} is not in the cache ({constants.HF_HUB_CACHE}) and could "
                f"not be downloaded: {runtime.first_line(error.__cause__ or error)}\n"
                "Without an internet connection: use another computer to download config.json, "
                f"{_WEIGHTS[0]} and, if there is one, preprocessor_config.json from\n"
                f"  {page}/tree/main\n"
                f"put them into the folder {folder}, and use {folder} as the weights.\n"
                "The default weights need no download."
            ) from error
    return None
