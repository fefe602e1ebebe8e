"""LoRA (Hu et al. 2022): a trainable low-rank update, the product of two small matrices."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lab.core import UserError


class _LowRank(nn.Module):
    """W -> W + B A / sqrt(r) for a weight (out, in); A (r, in) starts random, B (out, r) at zero.

    The scale is that of rank-stabilized LoRA (Kalajdzievski 2023), so that one learning rate fits
    all ranks.
    """

    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        self.scale = rank**-0.5
        self.A = nn.Parameter(torch.empty(rank, weight.shape[1]))
        self.B = nn.Parameter(torch.zeros(weight.shape[0], rank))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.B @ self.A * self.scale


def add_lora(model: nn.Module, rank: int, names: tuple[str, ...] = ("qkv", "proj")) -> None:
    """Freezes the model and adds trainable low-rank matrices to attention layers of these names.

    Raises: UserError, if there are no such layers or the rank does not fit them.
    """
    targets = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.split(".")[-1] in names and ".attn." in name
    ]
    if not targets:
        raise UserError(
            "this model has no attention layers named qkv or proj, which LoRA needs; use MODE=top-k"
        )
    width = min(min(layer.weight.shape) for layer in targets)
    if not 1 <= rank <= width:
        raise UserError(f"LORA_RANK={rank} must lie between 1 and {width}, the layers' width")
    for parameter in model.parameters():
        parameter.requires_grad = False
    for layer in targets:
        parametrize.register_parametrization(layer, "weight", _LowRank(layer.weight, rank))


def merge(model: nn.Module) -> None:
    """Adds the low-rank matrices to the weights, in place; a model without them is unchanged."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that the model would have after `merge`; the model does not change."""
    state = {n: v for n, v in model.state_dict().items() if ".parametrizations." not in n}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            state[f"{name}.weight"] = layer.weight.detach()
    return state
