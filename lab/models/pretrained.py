"""Files of weights from elsewhere, read without running anything that they might hold.

Where pretrained weights come from: a run of ours, a file, a folder, the Hugging Face hub, timm.

Downloads go through huggingface_hub, so HF_HOME, HF_ENDPOINT and HF_HUB_OFFLINE do what its
documentation says.

Pretrained weights as a model that can be trained: a plain ViT in our model.py, else timm's.
"""

import hashlib
import json
import pickle
import re
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from huggingface_hub import constants as hub_constants
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lab.core import UserError, checkpoints
from lab.data.preprocess import Preprocess
from lab.models.cnn import CNNConfig, ResidualCNN
from lab.models.conversion import (
    config_of,
    differences,
    from_google,
    from_processor,
    from_transformers,
    is_vit,
)
from lab.models.registry import OURS, TimmConfig, build_timm_model, unknown_architecture
from model import VisionTransformer, ViTConfig, interpolate_pos_embed


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
    return find_in_timm(source)


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
    state, header = checkpoints.load_weights(path)
    if missing := {"model", "config", "preprocess", "classes"} - header.keys():
        raise UserError(f"{path} comes from an earlier version of this lab: it does not say its "
                        f"{', '.join(sorted(missing))}. Train it again (--overwrite)")  # fmt: skip
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


def find_in_timm(name: str) -> Found:
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


@dataclass
class Pretrained:
    """A model with its released head, and what came with its weights."""

    model: nn.Module  # in eval mode, on the CPU, fp32
    preprocess: Preprocess
    classes: list[str] | None  # that the head knows, where the names came with it
    origin: str
    remarks: list[str]

    def fingerprint(self) -> str:
        """Of the weights' values, for a run's identity."""
        digest = hashlib.blake2b(digest_size=8)
        for name, value in self.model.state_dict().items():
            digest.update(name.encode())
            digest.update(value.contiguous().numpy())
        return digest.hexdigest()


def load_pretrained(
    source: str, img_size: int | None = None, drop_path_rate: float = 0.0, plain_only: bool = False
) -> Pretrained:
    """Loads released weights, strictly.

    Args:
        source: what `find` takes: a timm name, a repository, a file, a run of ours.
        img_size: side of the images in pixels; positions are resampled to it. None: the weights'.
        drop_path_rate: for the training to come.
        plain_only: refuse a ViT that model.py does not cover, instead of taking timm's.

    Raises: UserError, for weights that cannot be had, or do not fit.
    """
    try:
        found = find(source)
        if found.config is None:
            return from_timm(found, img_size, drop_path_rate, plain_only)
        if isinstance(found.config, CNNConfig):
            return cnn(found, found.config, img_size, plain_only)
        return ours(found, found.config, img_size, drop_path_rate)
    except UserError as error:
        if source in str(error):
            raise
        raise UserError(f"the weights {source!r}: {error}") from error


def ours(
    found: Found, config: ViTConfig, img_size: int | None, drop_path_rate: float
) -> Pretrained:
    """A plain ViT in model.py; its head is as released, or none if none came."""
    size = img_size or config.img_size
    config = replace(config, img_size=size, drop_path_rate=drop_path_rate)
    state = {name: value.float() for name, value in found.state.items()}
    prefix = int(config.class_token and not config.no_embed_class)
    grid = size // config.patch_size
    state["pos_embed"] = interpolate_pos_embed(state["pos_embed"], grid, prefix)
    model = VisionTransformer(config)
    checkpoints.load_strict(model, state, found.origin)
    preprocess = preprocess_of(found, size, config.in_chans)
    return Pretrained(model.eval(), preprocess, found.classes, found.origin, found.remarks)


def cnn(found: Found, config: CNNConfig, img_size: int | None, plain_only: bool) -> Pretrained:
    """A CNN of ours, to be looked at; it takes images of any size."""
    if plain_only:
        raise UserError(f"{found.origin} is a CNN: fine-tuning here is for ViTs")
    model = ResidualCNN(config)
    checkpoints.load_strict(model, found.state, found.origin)
    size = img_size or found.preprocess["img_size"]
    preprocess = preprocess_of(found, size, config.in_chans)
    return Pretrained(model.eval(), preprocess, found.classes, found.origin, found.remarks)


def from_timm(
    found: Found, img_size: int | None, drop_path_rate: float, plain_only: bool
) -> Pretrained:
    """Weights of an architecture of timm's: into model.py if that is the same, else timm's."""
    if not timm.is_model(found.architecture):
        raise UserError(unknown_architecture(found.architecture))
    cfg = timm.get_pretrained_cfg(found.architecture)
    asked = {**found.arguments, "num_classes": outputs(found, cfg.classifier)}
    model = blueprint(TimmConfig(found.architecture, asked))
    gaps = differences(model) if is_vit(model) else []
    if plain_only and gaps:
        raise UserError(
            f"{found.origin} is a ViT that model.py does not cover: it has {', '.join(gaps)}. "
            f"finetune_swin.py takes any model of timm's: --model {found.origin}"
        )
    if is_vit(model) and not gaps:
        if found.state.keys() - model.state_dict().keys():  # the authors' names, not timm's
            found.state = fill(found, asked).state_dict()
        norm = model.blocks[0].norm1
        config = config_of(found.state, model.blocks[0].attn.num_heads, norm.eps)
        return ours(found, config, img_size, drop_path_rate)

    own = found.arguments.get("img_size") or found.preprocess.get("img_size")
    own = own or found.preprocess.get("input_size") or cfg.input_size
    size = img_size or (own if isinstance(own, int) else own[-1])
    if cfg.fixed_input_size or "img_size" in asked:
        asked["img_size"] = size
    # Some architectures do not know a drop path; others, such as Swin, have one unless told.
    drops = [m.drop_prob for m in model.modules() if isinstance(m, timm.layers.DropPath)]
    if drop_path_rate or any(drops):
        asked["drop_path_rate"] = drop_path_rate
    stem = cfg.first_conv if isinstance(cfg.first_conv, str) else ""
    wanted, given = (s.get(f"{stem}.weight") for s in (model.state_dict(), found.state))
    if given is not None and wanted.shape[1] == 3 != given.shape[1]:
        asked["in_chans"] = given.shape[1]
    model = fill(found, asked)
    preprocess = preprocess_of(found, size, asked.get("in_chans", 3))
    return Pretrained(model.eval(), preprocess, found.classes, found.origin, found.remarks)


def blueprint(config: TimmConfig) -> nn.Module:
    """timm's model to look at: without memory and initialisation, where its code allows that."""
    try:
        with torch.device("meta"):
            return build_timm_model(config)
    except RuntimeError:
        return build_timm_model(config)


def outputs(found: Found, classifier: str | tuple[str, ...] | None) -> int:
    """How many outputs the released head has; 0: there is none."""
    names = (classifier,) if isinstance(classifier, str) else classifier or ()
    for name in (*names, "head", "fc", "classifier"):
        if f"{name}.weight" in found.state:
            return len(found.state[f"{name}.weight"])
    # CLIP's own files call it otherwise, and timm makes a head of it.
    return found.preprocess["num_classes"] if "visual.proj" in found.state else 0


def fill(found: Found, arguments: dict[str, Any]) -> nn.Module:
    """timm's model with the weights, which timm resamples to the image and window size.

    Raises: UserError, for weights that do not fit.
    """
    config = TimmConfig(found.architecture, arguments)
    channels = arguments.get("in_chans", 3)
    size = timm.get_pretrained_cfg(found.architecture).input_size[1:]
    overlay = {
        "state_dict": {name: value.float() for name, value in found.state.items()},
        "num_classes": arguments["num_classes"], "label_offset": 0, "custom_load": False,
        "input_size": (channels, *size), "first_conv": None,  # None: channels fit, none is made up
    }  # fmt: skip
    try:
        model = timm.create_model(
            config.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **config.keywords
        )
    except Exception as error:  # timm's conversions raise many kinds for what they do not know
        lines = "\n".join(str(error).splitlines()[:6]) or repr(error)
        raise UserError(f"{found.origin} does not fit {found.architecture}: {lines}") from error
    model.pretrained_cfg.pop("state_dict", None)  # a second copy of the weights
    parameters = dict(model.named_parameters())
    lacking = sorted(parameters.keys() - found.state.keys())
    if lacking and found.state.keys() <= model.state_dict().keys():  # timm lets some pass
        raise UserError(f"{found.origin} lacks {', '.join(lacking[:10])} of {found.architecture}")
    model.config = config
    return model


def preprocess_of(found: Found, img_size: int, channels: int) -> Preprocess:
    """What the weights want of images; ImageNet's values, with a remark, where nothing says it."""
    words = found.preprocess
    if not words:
        found.remarks.append("no mean and std came with these weights: ImageNet's are taken")
    mean = list(words.get("mean") or timm.data.IMAGENET_DEFAULT_MEAN)
    std = list(words.get("std") or timm.data.IMAGENET_DEFAULT_STD)
    if len(mean) != channels:
        mean, std = [sum(mean) / len(mean)] * channels, [sum(std) / len(std)] * channels
    interpolation, crop = words.get("interpolation", "bicubic"), words.get("crop_pct") or 1.0
    mode = words.get("crop_mode", "center")
    if interpolation not in ("bicubic", "bilinear"):
        found.remarks.append(f"interpolation {interpolation!r} is replaced by bicubic")
        interpolation = "bicubic"
    if mode != "center" or crop > 1:
        found.remarks.append(f"the crop {mode!r} with {crop:g} is replaced by the centre's")
    return Preprocess(img_size, mean, std, min(crop, 1.0), interpolation)


def reset_classifier(pretrained: Pretrained, classes: list[str]) -> str:
    """Gives the model an output for each class, zero at first; keeps the head of the same classes.

    Returns: what was done, in words.
    Raises: UserError, for a CNN of ours.
    """
    model, config = pretrained.model, pretrained.model.config
    timms = isinstance(config, TimmConfig)
    if not timms and not isinstance(model, VisionTransformer):
        raise UserError(
            f"{pretrained.origin} holds a {type(model).__name__}: only our ViTs and timm's models "
            "are fine-tuned"
        )
    had = config.arguments["num_classes"] if timms else config.num_classes
    if pretrained.classes == classes and had == len(classes):
        return f"the head of {pretrained.origin} is kept: it knows these {had} classes"
    if timms:
        model.reset_classifier(len(classes))
        arguments = {**config.arguments, "num_classes": len(classes)}
        model.config = TimmConfig(config.architecture, arguments)
    else:
        model.head = nn.Linear(config.embed_dim, len(classes))
        model.config = replace(config, num_classes=len(classes))
    new = list(classifier(model).parameters())
    for parameter in new:
        nn.init.zeros_(parameter)
    names = [name for name, value in model.named_parameters() if any(value is n for n in new)]
    was = f"in place of the {had} released outputs" if had else "where none was released"
    return f"a new head for {len(classes)} classes, {was}: {', '.join(names)}"


def classifier(model: nn.Module) -> nn.Module:
    """The output layer; a distilled DeiT has two of them."""
    head = model.head if isinstance(model, VisionTransformer) else model.get_classifier()
    return nn.ModuleList(head) if isinstance(head, tuple) else head


def reinitialized(model: nn.Module) -> nn.Module:
    """The same architecture, untrained: what pretraining is compared with."""
    if isinstance(model.config, TimmConfig):
        return build_timm_model(model.config)
    return type(model)(model.config)


@torch.no_grad()
def pooled_features(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the output layer reads: (B, C, H, W) to features (B, D)."""
    if isinstance(model, VisionTransformer):
        head, model.head = model.head, nn.Identity()
        try:
            return model(images)
        finally:
            model.head = head
    return model.forward_head(model.forward_features(images), pre_logits=True)
