"""The optimizers, their parameter groups, and the learning rate of each step."""

import inspect
import math
import re
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.adamw import adamw as fused_adamw

from lab.core import UserError, machine

BETAS = (0.9, 0.999)  # AdamW's decay rates for the averages of the gradient and of its square

machine.avoid_dynamo_import(
    Optimizer.add_param_group, Optimizer.zero_grad, Optimizer.state_dict, Optimizer.load_state_dict
)


class AdamW(torch.optim.AdamW):
    """PyTorch's AdamW, without the wrapper of `step` that imports torch._dynamo."""

    step = torch.no_grad()(inspect.unwrap(torch.optim.AdamW.step))


def adamw(
    model: nn.Module,
    learning_rate: float,
    weight_decay: float,
    layer_decay: float = 1.0,
    head_lr_mult: float = 1.0,
) -> AdamW:
    """AdamW (Loshchilov and Hutter 2019), with weight decay for weight matrices only.

    Args:
        model: its frozen parameters are ignored.
        learning_rate: the peak learning rate.
        weight_decay: multiplied by the learning rate in each step.
        layer_decay: each layer's learning rate is this factor times that of the layer above
            (Clark et al. 2020, section 3.2; Bao et al. 2022, appendix).
        head_lr_mult: the head's learning rate is this factor times the peak learning rate.

    Raises: UserError, for an invalid learning rate, decay or factor.
    """
    groups = [g for g in _weight_decay_groups(model, learning_rate, weight_decay) if g["params"]]
    if not 0 < layer_decay <= 1:
        raise UserError(f"LAYER_DECAY={layer_decay} must lie in (0, 1]; 1 turns it off")
    if head_lr_mult <= 0:
        raise UserError(f"HEAD_LR_MULT={head_lr_mult} must be above 0; 1 turns it off")
    if (layer_decay, head_lr_mult) != (1, 1):
        groups = _layer_groups(model, groups, layer_decay, head_lr_mult)
    return AdamW(groups, lr=learning_rate, betas=BETAS, fused=True)


class Muon(Optimizer):
    """Muon (Jordan et al. 2024), and AdamW for the groups with `use_fallback`.

    Takes the same steps as timm's Muon with `ns_coefficients="original"`, and keeps the same state.
    timm handles one matrix after the other, in about 35 kernels each. This class stacks all
    matrices of one shape, so a step of a ViT takes about 100 kernels at any depth.
    """

    def __init__(self, groups: list[dict], lr: float, momentum: float = 0.95):
        super().__init__(groups, {"lr": lr, "momentum": momentum, "use_fallback": False})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if group.get("use_fallback", False):
                self._adamw_step(group, params)
                continue
            by_shape: dict[tuple, list[nn.Parameter]] = defaultdict(list)
            for p in params:
                by_shape[p.device, p.dtype, p.shape].append(p)
            for same_shape in by_shape.values():
                self._muon_step(group, same_shape)

    def _muon_step(self, group: dict, params: list[nn.Parameter]) -> None:
        """One step for parameters of equal shape: matrices, or filters (out, in, height, width)."""
        lr, momentum, device = group["lr"], group["momentum"], params[0].device
        averages = self._states(params, "momentum_buffer")
        grads = [p.grad for p in params]
        torch._foreach_lerp_(averages, grads, weight=1 - momentum)
        updates = torch.stack(torch._foreach_lerp(grads, averages, weight=momentum))  # Nesterov
        matrices = updates.flatten(2)  # (K, out, in)
        dtype = torch.bfloat16 if machine.bf16_is_faster(device) else torch.float32
        orthogonal = orthogonalize(matrices.to(dtype)).to(updates.dtype).reshape(updates.shape)
        scale = 0.2 * max(matrices.shape[1:]) ** 0.5  # the size of AdamW's steps, Liu et al. 2025
        torch._foreach_mul_(params, 1 - lr * group["weight_decay"])
        torch._foreach_add_(params, orthogonal.unbind(), alpha=-lr * scale)

    def _adamw_step(self, group: dict, params: list[nn.Parameter]) -> None:
        """One step of torch's fused AdamW, in one kernel for all parameters."""
        fused_adamw(
            params, [p.grad for p in params], self._states(params, "exp_avg"),
            self._states(params, "exp_avg_sq"), [], self._states(params, "step"), fused=True,
            amsgrad=False, beta1=group["betas"][0], beta2=group["betas"][1], lr=group["lr"],
            weight_decay=group["weight_decay"], eps=group["eps"], maximize=False,
        )  # fmt: skip

    def _states(self, params: list[nn.Parameter], name: str) -> list[Tensor]:
        """The state `name` of each parameter, initially zero: its shape, or a scalar for `step`."""
        for p in params:
            if name not in self.state[p]:
                zero = torch.zeros((), device=p.device) if name == "step" else torch.zeros_like(p)
                self.state[p][name] = zero
        return [self.state[p][name] for p in params]


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearly orthogonal matrices with the singular vectors of the given ones, (K, m, n).

    Five Newton-Schulz iterations bring all singular values to between 0.7 and 1.2.
    """
    # Make the matrices wide, so that the Gram matrices below are small.
    x = matrices.mT if matrices.shape[1] > matrices.shape[2] else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan et al. 2024
    for _ in range(5):
        gram = x @ x.mT
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    return x.mT.contiguous() if matrices.shape[1] > matrices.shape[2] else x


def muon(model: nn.Module, learning_rate: float, weight_decay: float) -> Optimizer:
    """Muon for the weight matrices of the blocks, AdamW for the rest.

    Muon replaces the momentum of a matrix with the nearest orthogonal matrix, so that it learns in
    all directions at the same speed. Its steps are scaled to the size of AdamW's (Liu et al.
    2025), so one learning rate fits both. AdamW updates the patch embedding, the position
    embeddings, the norms, the biases, the head, and depthwise convolutions, which are not matrices.

    Raises: UserError, for an invalid learning rate or weight decay.
    """
    no_decay, decay = _weight_decay_groups(model, learning_rate, weight_decay)
    layer_of = layers(model)
    blocks = range(1, max(layer_of.values()))  # neither the patch embedding nor the head
    in_blocks = {p for name, p in model.named_parameters() if layer_of[name] in blocks}
    matrices = [p for p in decay["params"] if p in in_blocks and _is_matrix(p)]
    chosen = set(matrices)
    others = [p for p in decay["params"] if p not in chosen]
    # As in `adamw`, so that comparing the two optimizers compares only the blocks' matrices.
    adamw_settings = {"use_fallback": True, "betas": BETAS, "eps": 1e-8, "fused": True}
    groups = [
        {**no_decay, **adamw_settings},
        {**decay, "params": others, **adamw_settings},
        {**decay, "params": matrices},
    ]
    return Muon([group for group in groups if group["params"]], lr=learning_rate)


def _is_matrix(parameter: nn.Parameter) -> bool:
    """Whether Muon applies: a matrix, or filters with several inputs; no dimension below 4."""
    return parameter.shape[1] > 1 and min(len(parameter), parameter[0].numel()) >= 4


OPTIMIZERS = {"adamw": adamw, "muon": muon}


def by_name(name: str) -> Callable[[nn.Module, float, float], Optimizer]:
    """The function that makes an optimizer. Raises: UserError, for an unknown name."""
    if name not in OPTIMIZERS:
        raise UserError(f"OPTIMIZER={name!r} is not one of {', '.join(OPTIMIZERS)}")
    return OPTIMIZERS[name]


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
    matcher = model.group_matcher()
    if isinstance(matcher, dict):
        layer_of = _match_layers(matcher, [name for name, _ in model.named_parameters()])
    else:  # a function, as some models of timm have
        from timm.models import group_parameters  # slow to import: loads all of timm

        layer_of = group_parameters(model, matcher, reverse=True)
    last_block = max(layer_of.values()) - 1
    return {n: last_block if n.startswith("fc_norm.") else i for n, i in layer_of.items()}


def _match_layers(matcher: dict, names: list[str]) -> dict[str, int]:
    """timm's `group_parameters` for a dict, without importing timm, which takes a second.

    A value is a pattern, or pairs of a pattern and a suffix. A parameter's place is the position of
    its entry, then the numbers in the pattern's groups, then the suffix. Parameters that match
    nothing come last. A suffix of 99999 joins a parameter to the layer before it.
    """
    places: dict[str, tuple[float, ...]] = {}
    for position, entry in enumerate(matcher.values()):
        for pattern, suffix in [(entry, None)] if isinstance(entry, str) else entry or []:
            for name in names:
                if name not in places and (found := re.match(pattern, name)):
                    numbers = (*(g for g in found.groups() if g), *(suffix or ()))
                    places[name] = (position, *map(float, numbers))
    layer, layer_at = -1, {}
    for place in sorted({places.get(name, (math.inf,)) for name in names}):
        if layer < 0 or place[-1] != 99999:
            layer += 1
        layer_at[place] = layer
    return {name: layer_at[places.get(name, (math.inf,))] for name in names}


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

    def set_lr(self, optimizer: Optimizer, step: int) -> None:
        """Sets each group's learning rate: peak x fraction x the group's own `lr_scale`."""
        for group in optimizer.param_groups:
            peak = group.setdefault("peak_lr", group["lr"])
            group["lr"] = peak * self(step) * group.get("lr_scale", 1.0)
