"""The optimizers, their parameter groups, and the learning rate of each step."""

import math
from collections import defaultdict
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

import torch
from torch import nn

from lab.core import UserError, runtime

BETAS = (0.9, 0.999)  # AdamW's decay rates for the averages of the gradient and of its square


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    betas: tuple[float, float] = BETAS,
    layer_decay: float = 1.0,
    head_lr_mult: float = 1.0,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay for weight matrices only.

    Args:
        model: its frozen parameters are left out.
        learning_rate: the peak learning rate.
        weight_decay: multiplied by the learning rate in each step.
        betas: see BETAS.
        layer_decay: each layer's learning rate is this factor times that of the layer above
            (Clark et al. 2020, section 3.2; Bao et al. 2022, appendix).
        head_lr_mult: the head's learning rate is this factor times the peak learning rate.

    Raises: UserError, for a learning rate, decay or factor that cannot work.
    """
    groups = [g for g in _weight_decay_groups(model, learning_rate, weight_decay) if g["params"]]
    if not 0 < layer_decay <= 1:
        raise UserError(f"LAYER_DECAY={layer_decay} must lie in (0, 1]; 1 turns it off")
    if head_lr_mult <= 0:
        raise UserError(f"HEAD_LR_MULT={head_lr_mult} must be above 0; 1 turns it off")
    if (layer_decay, head_lr_mult) != (1, 1):
        groups = _layer_groups(model, groups, layer_decay, head_lr_mult)
    return torch.optim.AdamW(groups, lr=learning_rate, betas=betas, fused=True)


def muon(model: nn.Module, learning_rate: float, weight_decay: float) -> torch.optim.Optimizer:
    """Muon (Jordan et al. 2024) for the weight matrices of the blocks, AdamW for the rest.

    Muon replaces the momentum of a matrix by the nearest orthogonal matrix, so that it learns in
    all directions at the same speed. Its steps are scaled to the size of AdamW's (Liu et al.
    2025), so one learning rate fits both. AdamW updates the patch embedding, the positions, the
    norms, the biases and the head.

    Raises: UserError, for a learning rate or weight decay that cannot work.
    """
    from timm.optim import Muon  # slow to import: loads all of timm

    plain, decayed = _weight_decay_groups(model, learning_rate, weight_decay)
    layer_of = layers(model)
    blocks = range(1, max(layer_of.values()))  # neither the patch embedding nor the head
    in_blocks = {p for name, p in model.named_parameters() if layer_of[name] in blocks}
    matrices = [p for p in decayed["params"] if p in in_blocks]
    others = [p for p in decayed["params"] if p not in in_blocks]
    # As in `adamw`, so that comparing the two optimizers compares only the blocks' matrices.
    adam = {"use_fallback": True, "nesterov": False, "betas": BETAS, "eps": 1e-8}
    groups = [
        {**plain, **adam},
        {**decayed, "params": others, **adam},
        {**decayed, "params": matrices, "nesterov": True},
    ]
    groups = [group for group in groups if group["params"]]
    optimizer = Muon(groups, lr=learning_rate, ns_coefficients="original")
    optimizer.register_step_pre_hook(_set_muon_dtype)
    return optimizer


def _set_muon_dtype(optimizer: torch.optim.Optimizer, *_: object) -> None:
    """Makes timm's Muon compute in fp32 on hardware that only emulates bf16, which is slow."""
    from timm.optim import muon as timm_muon

    device = optimizer.param_groups[-1]["params"][0].device
    dtype = torch.bfloat16 if runtime.has_bf16(device) else torch.float32
    # timm has no option for it: this is the default of its last argument but one, `dtype`.
    function = timm_muon.zeropower_via_newtonschulz
    function.__defaults__ = (*function.__defaults__[:-2], dtype, function.__defaults__[-1])


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def _weight_decay_groups(
    model: nn.Module, learning_rate: float, weight_decay: float
) -> tuple[dict, dict]:
    """The parameter groups without and with weight decay; frozen parameters are in neither.

    Weight matrices and convolution filters decay. Biases, norms and other vectors do not, nor do
    the parameters that the model itself exempts, such as the position embeddings.
    """
    if not 0 < learning_rate < 1:
        raise UserError(
            f"LEARNING_RATE={learning_rate} must lie in (0, 1); ViTs usually need 5e-4 to 3e-3"
        )
    if not 0 <= weight_decay < math.inf:
        raise UserError(f"WEIGHT_DECAY={weight_decay} must be 0 or larger, such as 0.05")
    # timm's models list their exemptions, possibly as patterns, and so does ours.
    exempt = model.no_weight_decay() if hasattr(model, "no_weight_decay") else set()
    plain: dict = {"params": [], "weight_decay": 0.0}
    decayed: dict = {"params": [], "weight_decay": weight_decay}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        is_vector = parameter.ndim <= 1 or name.endswith(".bias")
        is_exempt = is_vector or any(fnmatch(name, pattern) for pattern in exempt)
        (plain if is_exempt else decayed)["params"].append(parameter)
    return plain, decayed


def layers(model: nn.Module) -> dict[str, int]:
    """The layer of each parameter by name: 0 is the patch embedding, the highest is the head.

    The model's own `group_matcher` defines them, as in timm, except that the norm after average
    pooling, `fc_norm`, belongs to the last block, as the norm before a class token's head does.
    """
    from timm.models import group_parameters  # slow to import: loads all of timm

    layer_of = group_parameters(model, model.group_matcher(), reverse=True)
    last_block = max(layer_of.values()) - 1
    return {n: last_block if n.startswith("fc_norm.") else i for n, i in layer_of.items()}


def _layer_groups(
    model: nn.Module, groups: list[dict], layer_decay: float, head_lr_mult: float
) -> list[dict]:
    """Splits parameter groups by layer. `lr_scale` is layer_decay ** (layers below the head)."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    layer_of = layers(model)
    head = max(layer_of.values())
    split: dict[tuple[int, float], list] = defaultdict(list)
    for group in groups:
        for parameter in group["params"]:
            split[layer_of[names[parameter]], group["weight_decay"]].append(parameter)
    scales = {layer: layer_decay ** (head - layer) for layer in range(head)}
    scales[head] = head_lr_mult
    return [
        {"params": params, "weight_decay": decay, "lr_scale": scales[layer]}
        for (layer, decay), params in split.items()
    ]


@dataclass(frozen=True)
class Schedule:
    """The learning rate as a fraction of its peak: a linear warm-up, then a decay to 0."""

    steps: int  # of the whole run
    warmup_steps: int = 0
    decay: Literal["cosine", "linear", "none"] = "cosine"

    def __call__(self, step: int) -> float:
        """The fraction of the peak at optimizer step `step`, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        if self.decay == "cosine":
            return (1 + math.cos(math.pi * progress)) / 2
        if self.decay == "linear":
            return 1 - progress
        return 1.0

    def set_lr(self, optimizer: torch.optim.Optimizer, step: int) -> None:
        """Sets each group's learning rate: peak x fraction x the group's own `lr_scale`."""
        for group in optimizer.param_groups:
            peak = group.setdefault("peak_lr", group["lr"])
            group["lr"] = peak * self(step) * group.get("lr_scale", 1.0)
