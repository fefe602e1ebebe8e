"""Where pretrained weights come from: a run of ours, a file, a folder, the Hugging Face hub, timm.

Downloads go through huggingface_hub, so HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE do what its
documentation says.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import timm
from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from torch import Tensor

from lab.checkpoints import load_weights
from lab.cnn import CNNConfig
from lab.convert import config_of, from_google, from_processor, from_transformers
from lab.errors import UserError
from lab.files import first_line, read_arrays, read_header, read_json, read_state
from lab.models import OURS, unknown_architecture
from model import ViTConfig

WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # the usual names, the safe one first
PICKLES = (".pth", ".pt", ".bin", ".tar")
Get = Callable[..., Path | None]  # the first of the files of these names that there is


@dataclass
class Found:
    """Weights as they were found; exactly one of `config` and `architecture` is given."""

    origin: str  # for messages and records
    state: dict[str, Tensor]
    config: ViTConfig | CNNConfig | None = None  # of a plain ViT in timm's names, or a CNN of ours
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
        raise UserError(f"the weights {source!r}: there is no such file or folder")
    repository = source.removeprefix("hf-hub:").removeprefix("hf_hub:")
    if re.fullmatch(r"[\w.-]+/[\w.-]+", repository):
        return from_repository(repository, partial(fetch, repository))
    return from_timm(source)


def short_name(source: str) -> str:
    """What weights are called in the name of a run."""
    path = Path(source)
    if path.is_dir():
        return path.resolve().name
    return path.stem if path.is_file() or "/" in source else source.split(".")[0]


def from_folder(folder: Path) -> Found:
    if (folder / "best.safetensors").is_file():
        return from_file(folder / "best.safetensors")
    if not (folder / "config.json").is_file():
        there = ", ".join(sorted(p.name for p in folder.iterdir())[:5]) or "nothing"
        raise UserError(
            f"{folder} holds no weights (it holds {there}). It must be a finished run, with "
            "best.safetensors, or have config.json and model.safetensors of a hub repository."
        )

    def local(*names: str) -> Path | None:
        return next((folder / name for name in names if (folder / name).is_file()), None)

    return from_repository(str(folder), local)


def from_repository(origin: str, get: Get) -> Found:
    """A repository of timm's or of transformers', on the hub or in a folder."""
    config = read_json(get("config.json"))
    if not config:
        raise UserError(f"{origin} has no config.json to say what its weights are")
    weights = get(*WEIGHTS)
    if weights is None:
        raise UserError(f"{origin} has neither of {', '.join(WEIGHTS)}")
    state = read_state(weights)
    if "architecture" in config:
        cfg = {**config, **config.get("pretrained_cfg", {})}
        cfg["num_classes"] = config.get("num_classes", cfg.get("num_classes", 0))
        return Found(origin, state, architecture=config["architecture"],
                     arguments=config.get("model_args") or {}, preprocess=cfg,
                     classes=cfg.get("label_names"))  # fmt: skip
    named, vit, left = from_transformers(state, config)
    labels = config.get("id2label") or {}
    classes = [labels[key] for key in sorted(labels, key=int)]
    given = classes and len(classes) == vit.num_classes and classes[0] != "LABEL_0"
    processor = from_processor(read_json(get("preprocessor_config.json")))
    return Found(origin, named, vit, preprocess=processor, classes=classes if given else None,
                 remarks=left_out(left))  # fmt: skip


def left_out(names: list[str]) -> list[str]:
    return [f"left out, of no use to model.py: {', '.join(names)}"] if names else []


def from_file(path: Path) -> Found:
    """One file: its own header, its name or its shapes say what it is."""
    if path.suffix == ".npz":
        state, config, left = from_google(read_arrays(path))
        half = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 0.9, "interpolation": "bicubic"}
        return Found(str(path), state, config, preprocess=half, remarks=left_out(left))
    header = read_header(path)
    if "vit-lab" in header:
        return from_run(path)
    if path.name in WEIGHTS and (path.parent / "config.json").is_file():
        return from_folder(path.parent)
    state = read_state(path)
    name = header.get("architecture") or architecture_in(path.stem)
    if name and timm.is_model(name):
        known = name if name in timm.list_pretrained() else name.split(".")[0]
        cfg = timm.get_pretrained_cfg(known).to_dict()
        remark = f"mean, std and crop are timm's for {known}, after the file's name or header"
        return Found(str(path), state, architecture=cfg["architecture"], preprocess=cfg,
                     remarks=[remark])  # fmt: skip
    if not {"patch_embed.proj.weight", "pos_embed", "blocks.0.attn.qkv.weight"} <= state.keys():
        raise UserError(
            f"the architecture of {path} cannot be told: name the file after it, such as "
            "swin_tiny_patch4_window7_224.safetensors, or give a folder with its config.json"
        )
    config = config_of(state)
    remark = f"{config.num_heads} heads are assumed, as ViTs of {config.embed_dim} channels have"
    return Found(str(path), state, config, remarks=[remark])


def from_run(path: Path) -> Found:
    """Weights that a script of ours has written, with its header."""
    state, header = load_weights(path)
    if missing := {"model", "config", "preprocess", "classes"} - header.keys():
        raise UserError(f"{path} comes from an earlier version of this lab: it does not say its "
                        f"{', '.join(sorted(missing))}. Train it again (--fresh)")  # fmt: skip
    found = Found(str(path), state, preprocess=header["preprocess"], classes=header["classes"])
    if header["model"] in OURS:
        found.config = OURS[header["model"]][1](**header["config"])
    elif header["model"] == "timm":
        found.architecture = header["config"]["architecture"]
        found.arguments = header["config"]["arguments"]
    else:
        raise UserError(f"{path} holds a {header['model']}, which is no model to start from")
    return found


def architecture_in(stem: str) -> str | None:
    """The longest of timm's names, with its tag if there is one, that a file's name starts with."""
    names = {*timm.list_models(), *timm.list_pretrained()}
    starts = [stem[:end] for end in range(len(stem), 0, -1) if not stem[end : end + 1].isalnum()]
    return next((start for start in starts if start in names), None)


def from_timm(name: str) -> Found:
    if not timm.is_model(name):
        raise UserError(
            f"the weights {name!r} are no file, no folder and no repository, and "
            f"{unknown_architecture(name)}"
        )
    architecture = name.split(".")[0]
    tags = [full for full in timm.list_pretrained() if full.split(".")[0] == architecture]
    if not tags or ("." in name and name not in tags):
        now = timm.models.get_deprecated_models().get(name)
        has = f"{now} is its name now" if now else f"it has: {', '.join(tags) or 'none'}"
        raise UserError(f"timm has no pretrained weights {name!r}; {has}")
    cfg = timm.get_pretrained_cfg(name)
    full = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    if not cfg.hf_hub_id:
        place = f"weights/{full}{Path(str(cfg.url)).suffix}"
        raise UserError(
            f"{full} is not on the hub: fetch {cfg.url}, put it at {place}, and run "
            f"with {place} instead of {name}"
        )
    wanted = (cfg.hf_hub_filename,) if cfg.hf_hub_filename else WEIGHTS
    weights = fetch(cfg.hf_hub_id, *wanted)
    if weights is None:
        raise UserError(f"{cfg.hf_hub_id} has neither of {', '.join(wanted)}")
    return Found(full, read_state(weights), architecture=cfg.architecture,
                 preprocess=cfg.to_dict())  # fmt: skip


def fetch(repository: str, *names: str) -> Path | None:
    """The first of a hub repository's files of these names that there is, or None.

    What is in the cache, a file or that there is none, is taken without asking the network.

    Raises: UserError, if there is no network, or no such repository.
    """
    cached = {name: try_to_load_from_cache(repository, name) for name in names}
    for path in cached.values():
        if isinstance(path, str):
            return Path(path)
    page = f"{hub_constants.ENDPOINT}/{repository}"
    for name in (name for name, known in cached.items() if known is None):
        try:
            return Path(hf_hub_download(repository, name))
        except GatedRepoError as error:
            raise UserError(f"{page} is gated: accept its terms and `hf auth login`") from error
        except RepositoryNotFoundError as error:
            raise UserError(f"{repository} is no folder here, and {page} does not exist") from error
        except Exception as error:  # no network, offline mode, a proxy, no space: each its own kind
            if isinstance(error, EntryNotFoundError) and not isinstance(error, FileNotFoundError):
                continue  # the repository has no such file
            folder = f"weights/{repository.split('/')[1]}"
            raise UserError(
                f"{name} of {repository} is not in the cache ({hub_constants.HF_HUB_CACHE}) and "
                f"could not be downloaded: {first_line(error.__cause__ or error)}\n"
                f"Without a network: on a machine that has one, fetch config.json, {WEIGHTS[0]} "
                f"and, where there is one, preprocessor_config.json from\n  {page}/tree/main\n"
                f"put them into the folder {folder}, and run with {folder} as the weights.\n"
                "A run that needs no download: leave the weights as they were"
            ) from error
    return None
