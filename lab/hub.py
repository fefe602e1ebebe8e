"""Where pretrained weights come from: a run of ours, a file, a folder, the Hugging Face hub, timm.

Downloads go through huggingface_hub, so HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE do what its
documentation says. Nothing is unpickled that could run code.
"""

import json
import pickle
import re
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from timm.models import load_state_dict
from torch import Tensor

from lab.checkpoints import load_weights
from lab.convert import config_of, from_google, from_transformers
from lab.errors import UserError
from lab.models import unknown_architecture
from lab.preprocess import Preprocess
from model import ViTConfig

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the usual names, the safe one first
PICKLES = (".pth", ".pt", ".bin", ".tar")


@dataclass
class Found:
    """Weights as they were found; exactly one of `config` and `architecture` is given."""

    origin: str  # for messages and records
    state: dict[str, Tensor]
    config: ViTConfig | None = None  # of a plain ViT in timm's names
    architecture: str | None = None  # of timm's
    arguments: dict[str, Any] = field(default_factory=dict)  # for timm.create_model
    preprocess: dict[str, Any] = field(default_factory=dict)  # timm's words; {}: not known
    classes: list[str] | None = None
    remarks: list[str] = field(default_factory=list)


def find(source: str) -> Found:
    """Reads the weights that a name or path stands for.

    Args:
        source: a run of ours (its folder, or its best.safetensors), a folder with config.json and
            weights, a .safetensors, .pth or Google .npz file, a Hugging Face repository
            (owner/name), or a timm name.

    Raises: UserError, which says what to fetch, or what the names are.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return from_folder(path)
    if path.is_file():
        return from_file(path)
    if path.suffix in (".safetensors", ".npz", *PICKLES) or source.startswith((".", "/", "~")):
        raise UserError(f"PRETRAINED={source!r}: there is no such file or folder")
    repository = source.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        files = {"config.json": fetch(repository, "config.json")}
        return from_repository(repository, files, lambda name: fetch(repository, name))
    return from_timm(source)


def from_folder(folder: Path) -> Found:
    if (folder / "best.safetensors").is_file():
        return from_file(folder / "best.safetensors")
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{folder} holds no weights (it holds {there}). It must be a finished run, with "
            "best.safetensors, or have config.json and model.safetensors of a hub repository."
        )

    def local(name: str) -> Path | None:
        return folder / name if (folder / name).is_file() else None

    return from_repository(str(folder), {"config.json": folder / "config.json"}, local)


def from_repository(origin: str, files: dict[str, Path], get: Any) -> Found:
    """A repository of timm's or of transformers', on the hub or in a folder."""
    config = json.loads(files["config.json"].read_text(encoding="utf-8"))
    weights = next((file for name in WEIGHTS if (file := get(name))), None)
    if weights is None:
        raise UserError(f"{origin} has neither of {', '.join(WEIGHTS)}")
    state = read_state(weights)
    if "architecture" in config:
        cfg = config.get("pretrained_cfg", config)
        return Found(origin, state, architecture=config["architecture"],
                     arguments=config.get("model_args") or {}, preprocess=cfg)  # fmt: skip
    named, vit = from_transformers(state, config)
    left = sorted(name for name in named if name.startswith("pooler."))
    remarks = [f"left out, not used by the classifier: {', '.join(left)}"] if left else []
    named = {name: value for name, value in named.items() if name not in left}
    labels = config.get("id2label") or {}
    classes = [labels[key] for key in sorted(labels, key=int)]
    named_ones = classes and len(classes) == vit.num_classes and classes[0] != "LABEL_0"
    processor = get("preprocessor_config.json")
    words = json.loads(processor.read_text(encoding="utf-8")) if processor else {}
    return Found(origin, named, vit, preprocess=translate(words),
                 classes=classes if named_ones else None, remarks=remarks)  # fmt: skip


def translate(processor: dict[str, Any]) -> dict[str, Any]:
    """transformers' preprocessor_config.json in timm's words; {} for none."""
    if not processor:
        return {}
    plain = processor.get("do_normalize") is False
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    edge = size if isinstance(size, int) else size.get("shortest_edge")
    cut = crop if isinstance(crop, int) else crop.get("height")
    return {
        "mean": [0.0] * 3 if plain else processor.get("image_mean", [0.5] * 3),
        "std": [1.0] * 3 if plain else processor.get("image_std", [0.5] * 3),
        "interpolation": "bicubic" if processor.get("resample", 2) == 3 else "bilinear",
        "crop_pct": cut / edge if processor.get("do_center_crop") and cut and edge else 1.0,
    }


def from_file(path: Path) -> Found:
    """One file: its own header, its name or its shapes say what it is."""
    if path.suffix == ".npz":
        state, config = from_google(read_arrays(path))
        half = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
        return Found(str(path), state, config, preprocess=half)
    header = read_header(path)
    if "vit-lab" in header:
        state, ours = load_weights(path)
        found = Found(str(path), state, preprocess=ours["preprocess"], classes=ours["classes"])
        if ours["model"] == "VisionTransformer":
            found.config = ViTConfig(**ours["config"])
        else:
            found.architecture = ours["config"]["architecture"]
            found.arguments = ours["config"]["arguments"]
        return found
    state = read_state(path)
    name = header.get("architecture") or architecture_in(path.stem)
    if name:
        cfg = timm.get_pretrained_cfg(name).to_dict()
        remark = f"mean, std and crop are timm's for {name}, after the file's name or header"
        return Found(str(path), state, architecture=cfg["architecture"], preprocess=cfg,
                     remarks=[remark])  # fmt: skip
    if "patch_embed.proj.weight" not in state:
        raise UserError(
            f"the architecture of {path} cannot be told: name the file after it, such as "
            "swin_tiny_patch4_window7_224.safetensors, or give a folder with its config.json"
        )
    return Found(str(path), state, config_of(state))


def architecture_in(stem: str) -> str | None:
    """The longest of timm's names, with its tag if there is one, that a file's name starts with."""
    names = [*timm.list_models(), *timm.list_pretrained()]
    return max((name for name in names if stem.startswith(name)), key=len, default=None)


def from_timm(name: str) -> Found:
    if not timm.is_model(name):
        raise UserError(
            f"PRETRAINED={name!r} is no file, no folder and no repository, and "
            f"{unknown_architecture(name)}"
        )
    architecture = name.split(".")[0]
    tags = [full for full in timm.list_pretrained() if full.split(".")[0] == architecture]
    if not tags or ("." in name and name not in tags):
        raise UserError(
            f"timm has no pretrained weights {name!r}; it has: {', '.join(tags) or 'none'}"
        )
    cfg = timm.get_pretrained_cfg(name)
    repository = cfg.hf_hub_id or f"timm/{name}"
    wanted = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHTS
    weights = next((file for n in wanted if (file := fetch(repository, n))), None)
    if weights is None:
        raise UserError(f"https://huggingface.co/{repository} has neither of {', '.join(wanted)}")
    full = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    return Found(full, read_state(weights), architecture=cfg.architecture,
                 preprocess=cfg.to_dict())  # fmt: skip


def fetch(repository: str, name: str) -> Path | None:
    """A file of a hub repository, from the cache or the network; None if it has no such file.

    Raises: UserError, if there is no network, or no such repository.
    """
    with suppress(Exception):  # what is in the cache is taken without asking the network
        return Path(hf_hub_download(repository, name, local_files_only=True))
    try:
        return Path(hf_hub_download(repository, name))
    except RepositoryNotFoundError as error:
        raise UserError(
            f"there is no repository {repository} on {hub_constants.ENDPOINT}"
        ) from error
    except Exception as error:  # no network, offline mode, a proxy, no space: each its own kind
        if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
            return None
        folder = f"weights/{repository.split('/')[1]}"
        raise UserError(
            f"{name} of {repository} is not in the cache ({hub_constants.HF_HUB_CACHE}) and could "
            f"not be downloaded: {str(error).splitlines()[0] or repr(error)}\n"
            f"Without a network: fetch config.json and {WEIGHTS[0]} from\n"
            f"  {hub_constants.ENDPOINT}/{repository}/tree/main\non a machine that has one, put both "
            f"into the folder {folder}, and run with --pretrained {folder}\n"
            "A run that needs no download: leave PRETRAINED as it was"
        ) from error


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
        return load_state_dict(str(path), use_ema=False, weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, RuntimeError, EOFError) as error:
        unsafe = "" if path.suffix == ".safetensors" else (
            ". A pickle that holds more than tensors could run code and is refused; get the "
            "weights as .safetensors"
        )  # fmt: skip
        raise UserError(f"{path} cannot be read: {str(error).splitlines()[0]}{unsafe}") from error


def read_arrays(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return dict(file)
    except (ValueError, OSError, EOFError) as error:
        raise UserError(f"{path} is not a whole .npz of arrays: {error}") from error


def preprocess_of(found: Found, img_size: int, channels: int) -> Preprocess:
    """What the weights want of images; ImageNet's values, with a remark, where nothing says it."""
    words = found.preprocess
    if not words:
        found.remarks.append("no mean and std came with these weights: ImageNet's are taken")
    mean = list(words.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN)
    std = list(words.get("std") or timm.data.IMAGENET_DEFAULT_STD)
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    interpolation = words.get("interpolation", "bicubic")
    if interpolation not in ("bicubic", "bilinear"):
        found.remarks.append(f"interpolation {interpolation!r} is replaced by bicubic")
        interpolation = "bicubic"
    return Preprocess(img_size, mean, std, words.get("crop_pct") or 1.0, interpolation)
