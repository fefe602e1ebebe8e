"""Modes of fine-tuning: what is trained, what is frozen, and which rate is right for it."""

from typing import Any

from torch import nn

from lab.core import UserError
from lab.models.lora import add_lora
from lab.models.pretrained import classifier
from lab.training.optimizers import layers

# Peak rates for a model 768 wide, as ViT-B is; a narrower one takes more in proportion (Yang et al.
# 2022). A rate good for training from scratch destroys what a pretrained model knows, when all of
# it is trained; a warning is given beyond RATE_RANGE times the rate here.
RATES = {"scratch": 3e-4, "full": 3e-5, "layer-decay": 2e-4, "top-k": 2e-4, "lora": 5e-4}
RATE_RANGE = (0.01, 5.0)


def mode_label(constants: dict[str, Any]) -> str:
    """What a run's constants say is trained, for tables and pictures."""
    labels = {
        "top-k": f"top {constants['TOP_K']}",
        "lora": f"LoRA {constants['LORA_RANK']}",
        "full": "full" + f", decay {constants['LAYER_DECAY']:g}" * (constants["LAYER_DECAY"] != 1),
    }
    rate = f", rate {r:g}" if (r := constants.get("LEARNING_RATE")) else ""
    return labels.get(constants["MODE"], constants["MODE"]) + rate


def set_trainable(model: nn.Module, mode: str, top_k: int, lora_rank: int) -> None:
    """Freezes what the mode does not train. Raises UserError, for more than the model has."""
    if mode == "head":
        train_only_top(model, 0)
    elif mode == "top-k":
        if top_k < 1:
            raise UserError(f"TOP_K={top_k} must be at least 1; MODE=head trains the head alone")
        train_only_top(model, top_k)
    elif mode == "lora":
        add_lora(model, lora_rank)
        classifier(model).requires_grad_(True)


def train_only_top(model: nn.Module, blocks: int) -> None:
    """Freezes all but the head and, with the final norm, the last `blocks` blocks.

    0 leaves the head alone. Raises: UserError, for more blocks than there are.
    """
    layer_of = layers(model)
    top = max(layer_of.values())  # the head; 0 is the patch embedding
    if not 0 <= blocks < top:
        raise UserError(f"TOP_K={blocks} must lie between 1 and {top - 1}, the model's blocks")
    for name, parameter in model.named_parameters():
        parameter.requires_grad = layer_of[name] >= top - blocks


def variant_of(model: nn.Module, mode: str, top_k: int, layer_decay: float) -> str:
    """Which of RATES a mode takes: training most of the blocks is like training all of them."""
    if mode == "full" and layer_decay < 1:
        return "layer-decay"
    depth = max(layers(model).values()) - 1
    return "full" if mode == "top-k" and 2 * top_k > depth else mode


def default_learning_rate(model: nn.Module, variant: str) -> float:
    """The peak rate for a mode and this model's width, which is what its output layer reads."""
    width = next(p for p in classifier(model).parameters() if p.ndim > 1).shape[1]
    return RATES[variant] * 768 / width


def learning_rate_warning(model: nn.Module, variant: str, rate: float) -> str | None:
    """A sentence if a rate is far from the usual ones."""
    least, most = (share * default_learning_rate(model, variant) for share in RATE_RANGE)
    if least <= rate <= most:
        return None
    return (
        f"warning: LEARNING_RATE={rate:g} is unusual for {variant} on this model: rates between "
        f"{least:.0e} and {most:.0e} are sane"
    )
