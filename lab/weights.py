"""Pretrained weights as a model that can be trained: a plain ViT in our model.py, else timm's."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import nn

from lab.checkpoints import load_strictly
from lab.cnn import CNNConfig, ResidualCNN
from lab.convert import config_of, differences, is_vit
from lab.errors import UserError
from lab.hub import Found, find
from lab.models import TimmConfig, timm_model, unknown_architecture
from lab.preprocess import Preprocess
from model import VisionTransformer, ViTConfig, interpolate_pos_embed


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
        source: what `lab.hub.find` takes: a timm name, a repository, a file, a run of ours.
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
    load_strictly(model, state, found.origin)
    preprocess = preprocess_of(found, size, config.in_chans)
    return Pretrained(model.eval(), preprocess, found.classes, found.origin, found.remarks)


def cnn(found: Found, config: CNNConfig, img_size: int | None, plain_only: bool) -> Pretrained:
    """A CNN of ours, to be looked at; it takes images of any size."""
    if plain_only:
        raise UserError(f"{found.origin} is a CNN: fine-tuning here is for ViTs")
    model = ResidualCNN(config)
    load_strictly(model, found.state, found.origin)
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
            return timm_model(config)
    except RuntimeError:
        return timm_model(config)


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


def adapt_head(pretrained: Pretrained, classes: list[str]) -> str:
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


def with_random_weights(model: nn.Module) -> nn.Module:
    """The same architecture, untrained: what pretraining is compared with."""
    if isinstance(model.config, TimmConfig):
        return timm_model(model.config)
    return type(model)(model.config)


@torch.no_grad()
def pooled(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """What the output layer reads: (B, C, H, W) to features (B, D)."""
    if isinstance(model, VisionTransformer):
        head, model.head = model.head, nn.Identity()
        try:
            return model(images)
        finally:
            model.head = head
    return model.forward_head(model.forward_features(images), pre_logits=True)
