"""LoRA (Hu et al. 2022): beside a frozen weight, a product of two thin trained matrices."""

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lab.core import UserError


class LowRank(nn.Module):
    """W -> W + B A / sqrt(r) for a weight (out, in): A (r, in) random, B (out, r) zero at first.

    The scale is that of rank-stabilised LoRA (Kalajdzievski 2023): one rate serves all ranks.
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
    """Freezes the model but for new low-rank parts on its attention layers of these names.

    Raises: UserError, if there are none or the rank does not fit them.
    """
    found = [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and name.split(".")[-1] in names and ".attn." in name
    ]
    if not found:
        raise UserError("this model has no attention layers qkv and proj for LoRA; take MODE=top-k")
    least = min(min(layer.weight.shape) for layer in found)
    if not 1 <= rank <= least:
        raise UserError(f"LORA_RANK={rank} must lie between 1 and {least}, the width")
    for parameter in model.parameters():
        parameter.requires_grad = False
    for layer in found:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))


def merge(model: nn.Module) -> None:
    """Adds the low-rank parts into the weights, in place; without them nothing happens."""
    for layer in list(model.modules()):
        if parametrize.is_parametrized(layer):
            parametrize.remove_parametrizations(layer, "weight", leave_parametrized=True)


def merged_state(model: nn.Module) -> dict[str, Tensor]:
    """The state that the model has after `merge`; the model stays as it is."""
    state = {n: v for n, v in model.state_dict().items() if ".parametrizations." not in n}
    for name, layer in model.named_modules():
        if parametrize.is_parametrized(layer):
            state[f"{name}.weight"] = layer.weight.detach()
    return state
