"""Pretrained weights as a model that can be trained: a plain ViT in our model.py, else timm's."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

import timm
import torch
from torch import nn

from lab.checkpoints import load_strictly
from lab.convert import config_of, differences, is_vit
from lab.errors import UserError
from lab.hub import Found, find, preprocess_of
from lab.models import TimmConfig, timm_model
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
    found = find(source)
    if found.config is None:
        return from_timm(found, img_size, drop_path_rate, plain_only)
    return ours(found, found.config, img_size, drop_path_rate)


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


def from_timm(
    found: Found, img_size: int | None, drop_path_rate: float, plain_only: bool
) -> Pretrained:
    """Weights of an architecture of timm's: into model.py if that is the same, else timm's."""
    cfg = timm.get_pretrained_cfg(found.architecture)
    head = found.state.get(f"{cfg.classifier}.weight")
    asked = {**found.arguments, "num_classes": 0 if head is None else len(head)}
    model = timm_model(TimmConfig(found.architecture, asked))
    if is_vit(model) and not (gaps := differences(model)):
        if not set(found.state) <= set(model.state_dict()):  # the authors' names, not timm's
            found.state = fill(found, asked).state_dict()
        block = model.blocks[0]
        eps = block.norm1.eps
        return ours(found, config_of(found.state, block.attn.num_heads, eps), img_size,
                    drop_path_rate)  # fmt: skip
    if plain_only and is_vit(model):
        raise UserError(
            f"{found.origin} is a ViT that model.py does not cover: it has {', '.join(gaps)}. "
            f"finetune_swin.py takes any model of timm's: --pretrained {found.origin}"
        )
    size = (found.preprocess.get("input_size") or (3, 224, 224))[-1]
    size = img_size or found.preprocess.get("img_size") or size
    if cfg.fixed_input_size:
        asked["img_size"] = size
    if drop_path_rate:
        asked["drop_path_rate"] = drop_path_rate
    model = fill(found, asked)
    channels = asked.get("in_chans", 3)
    preprocess = preprocess_of(found, size, channels)
    return Pretrained(model.eval(), preprocess, found.classes, found.origin, found.remarks)


def fill(found: Found, arguments: dict[str, Any]) -> nn.Module:
    """timm's model with the weights, which timm resamples to the image and window size.

    Raises: UserError, for weights that do not fit.
    """
    config = TimmConfig(found.architecture, arguments)
    timm_model(config)  # the arguments' mistakes, told apart from those of the weights
    overlay = {
        "state_dict": {name: value.float() for name, value in found.state.items()},
        "num_classes": arguments["num_classes"], "custom_load": False,
        "input_size": (arguments.get("in_chans", 3), 224, 224),
    }  # fmt: skip
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in arguments.items()}
    try:
        model = timm.create_model(
            config.architecture, pretrained=True, pretrained_cfg_overlay=overlay, **given
        )
    except RuntimeError as error:
        lines = "\n".join(str(error).splitlines()[:6])
        raise UserError(f"{found.origin} does not fit {found.architecture}: {lines}") from error
    model.config = config
    return model


def adapt_head(pretrained: Pretrained, classes: list[str]) -> str:
    """Gives the model an output for each class, zero at first; keeps the head of the same classes.

    Returns: what was done, in words.
    """
    model, config = pretrained.model, pretrained.model.config
    timms = isinstance(config, TimmConfig)
    had = config.arguments["num_classes"] if timms else config.num_classes
    same = pretrained.classes == classes if pretrained.classes else had == len(classes)
    if same and had:
        return f"the head of {pretrained.origin} is kept: it knows these {had} classes"
    if timms:
        model.reset_classifier(len(classes))
        arguments = {**config.arguments, "num_classes": len(classes)}
        model.config = TimmConfig(config.architecture, arguments)
    else:
        model.head = nn.Linear(config.embed_dim, len(classes))
        model.config = replace(config, num_classes=len(classes))
    for parameter in classifier(model).parameters():
        nn.init.zeros_(parameter)
    was = f"in place of the {had} released outputs" if had else "where none was released"
    return f"a new head for {len(classes)} classes, {was}"


def classifier(model: nn.Module) -> nn.Module:
    """The output layer."""
    return model.head if isinstance(model, VisionTransformer) else model.get_classifier()


def with_random_weights(model: nn.Module) -> nn.Module:
    """The same architecture, untrained: what pretraining is compared with."""
    if isinstance(model, VisionTransformer):
        return VisionTransformer(model.config)
    return timm_model(model.config)


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
