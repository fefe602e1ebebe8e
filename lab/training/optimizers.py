"""The optimizer, its parameter groups, and the learning rate over a run."""

import math
from collections import defaultdict
from dataclasses import dataclass
from typing import Literal

import torch
from timm.models import group_parameters
from timm.optim import Muon, param_groups_weight_decay
from torch import nn

from lab.core import UserError

NO_DECAY = ("cls_token", "pos_embed")  # beside biases, norms and LayerScale, which are 1-d
VIT_LAYERS = {  # of model.py, in timm's language: the final norm goes with the last block
    "stem": r"^cls_token|pos_embed|patch_embed",
    "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
}


def checked_groups(model: nn.Module, learning_rate: float, weight_decay: float) -> list[dict]:
    """What has no decay, then what has: weight matrices and filters, none of NO_DECAY.

    Frozen parameters are left out.
    Raises: UserError, for a rate or decay that cannot be right.
    """
    if not 0 < learning_rate < 1:
        raise UserError(f"LEARNING_RATE={learning_rate} must lie in (0, 1); ViTs like 5e-4 to 3e-3")
    if weight_decay < 0:
        raise UserError(f"WEIGHT_DECAY={weight_decay} must be 0 or above, such as 0.05")
    own = getattr(model, "no_weight_decay", set)()  # timm's models name theirs
    return param_groups_weight_decay(model, weight_decay, no_weight_decay_list={*NO_DECAY, *own})


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.999),
    layer_decay: float = 1.0,
    head_lr_mult: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), fused; decay on weight matrices alone.

    layer_decay: each layer's rate is so many times that of the layer above it (Clark et al. 2020,
        section 3.2; Bao et al. 2022, appendix).
    head_lr_mult: the head's rate is so many times the rate of the rest.
    Raises: UserError, for a rate or decay that cannot be right.
    """
    groups = checked_groups(model, learning_rate, weight_decay)
    if not 0 < layer_decay <= 1:
        raise UserError(f"LAYER_DECAY={layer_decay} must lie in (0, 1]; 1 is the same rate for all")
    if head_lr_mult <= 0:
        raise UserError(f"HEAD_LR_MULT={head_lr_mult} must be above 0; 1 is the same rate for all")
    if layer_decay < 1 or head_lr_mult != 1:
        groups = split_by_layer(model, groups, layer_decay, head_lr_mult)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def muon(model: nn.Module, learning_rate: float, weight_decay: float) -> Muon:
    """Muon (Jordan et al. 2024) on the matrices and filters of the blocks, AdamW on all else.

    Muon turns the momentum of a matrix into the nearest orthogonal one, so that every direction
    learns at the same speed. Its steps are scaled to the size of AdamW's (Liu et al. 2025), so one
    rate serves both. The embedding, positions, norms, biases and the head stay with AdamW.

    Raises: UserError, for a rate or decay that cannot be right.
    """
    plain, decayed = checked_groups(model, learning_rate, weight_decay)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layer_of = layers(model)
    between = range(1, max(layer_of.values()))  # neither the embedding nor the head
    split: dict[bool, list] = {True: [], False: []}
    for parameter in decayed["params"]:
        split[layer_of[names[id(parameter)]] in between].append(parameter)
    adam = {"use_fallback": True, "nesterov": False}
    groups = [
        {**plain, **adam},
        {**decayed, "params": split[False], **adam},
        {**decayed, "params": split[True], "nesterov": True},
    ]
    return Muon(groups, lr=learning_rate, ns_coefficients="original")


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter, from 0 for the patch embedding up to the head.

    timm's own division: a model of timm's brings it, ours is that of timm's ViT.
    """
    matcher = model.group_matcher() if hasattr(model, "group_matcher") else VIT_LAYERS
    return group_parameters(model, matcher, reverse=True)


def split_by_layer(
    model: nn.Module, groups: list[dict], layer_decay: float, head_lr_mult: float
) -> list[dict]:
    """Splits optimizer groups by layer; `lr_scale` is layer_decay ** (layers below the head)."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    layer_of = layers(model)
    top = max(layer_of.values())
    split: dict[tuple[int, float], list] = defaultdict(list)
    for group in groups:
        for parameter in group["params"]:
            split[layer_of[names[id(parameter)]], group["weight_decay"]].append(parameter)
    scales = {layer: layer_decay ** (top - layer) for layer in range(top)} | {top: head_lr_mult}
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scales[layer]}
        for (layer, decay), params in split.items()
    ]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a share of its peak: a linear warm-up, then a decay, step by step."""

    steps: int  # of the whole run
    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "none"] = "cosine"

    def __call__(self, step: int) -> float:
        """The share at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        done = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        left = {
            "cosine": (1 + math.cos(math.pi * done)) / 2,
            "linear": 1 - done,
            "none": 1.0,
        }[self.decay]
        return left

    def set(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Gives every group its rate for this step: peak x share x the group's own `lr_scale`."""
        for group in optimizer.param_groups:
            peak = group.setdefault("peak_lr", group["lr"])
            group["lr"] = peak * self(step) * group.get("lr_scale", 1.0)
