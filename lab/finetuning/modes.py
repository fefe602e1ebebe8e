"""Modes of fine-tuning: what is trained, what is frozen, and which learning rate fits."""

from typing import Any

from torch import nn

from lab.core import UserError
from lab.models import lora, registry
from lab.training import optimizers

# Peak learning rates for a model of width 768, such as ViT-B. Narrower models get proportionally
# higher learning rates (Yang et al. 2022). If all layers are trained, a learning rate suited to
# training from scratch destroys the pretrained features.
_LEARNING_RATES = {
    "scratch": 3e-4, "full": 3e-5, "layer-decay": 2e-4, "top-k": 2e-4, "lora": 5e-4,
}  # fmt: skip
_USUAL_RANGE = (0.01, 5.0)  # relative to the default learning rate; outside it there is a warning


def mode_label(constants: dict[str, Any]) -> str:
    """What is trained in a run with these constants, for tables and figures."""
    labels = {
        "top-k": f"top {constants['TOP_K']}",
        "lora": f"LoRA {constants['LORA_RANK']}",
        "full": "full"
        + f", layer decay {constants['LAYER_DECAY']:g}" * (constants["LAYER_DECAY"] != 1),
    }
    learning_rate = constants.get("LEARNING_RATE")
    suffix = f", learning rate {learning_rate:g}" if learning_rate else ""
    return labels.get(constants["MODE"], constants["MODE"]) + suffix


def set_trainable(model: nn.Module, mode: str, top_k: int, lora_rank: int) -> None:
    """Freezes what a mode does not train.

    Args:
        model: with the head to train.
        mode: "head" trains the output layer, "top-k" also the last blocks and the final norm,
            "lora" the output layer and low-rank additions, "full" and "scratch" everything.
        top_k: number of blocks for "top-k".
        lora_rank: rank for "lora".

    Raises: UserError, for an unknown mode, or more blocks or a higher rank than the model has.
    """
    if mode not in (modes := ("full", "head", "top-k", "lora", "scratch")):
        raise UserError(f"MODE={mode!r} is not one of {', '.join(modes)}, all")
    if mode == "lora":
        lora.add_lora(model, lora_rank)
    elif mode == "head":
        model.requires_grad_(False)
    elif mode == "top-k":
        layer_of = optimizers.layers(model)
        head = max(layer_of.values())  # 0 is the patch embedding
        if not 1 <= top_k < head:
            raise UserError(
                f"TOP_K={top_k} must lie between 1 and {head - 1}, the number of blocks; MODE=head "
                "trains no blocks"
            )
        for name, parameter in model.named_parameters():
            parameter.requires_grad = layer_of[name] >= head - top_k
    registry.classifier(model).requires_grad_(True)


def variant_of(model: nn.Module, mode: str, top_k: int, layer_decay: float) -> str:
    """The variant of a mode that determines its default learning rate.

    Training most of the blocks is like training all of them, and layer decay allows a higher rate.
    """
    if mode == "full" and layer_decay < 1:
        return "layer-decay"
    depth = max(optimizers.layers(model).values()) - 1
    return "full" if mode == "top-k" and 2 * top_k > depth else mode


def default_learning_rate(model: nn.Module, variant: str) -> float:
    """The peak learning rate for a variant and the model's width, the input size of its head."""
    width = next(p for p in registry.classifier(model).parameters() if p.ndim > 1).shape[1]
    return _LEARNING_RATES[variant] * 768 / width


def learning_rate_warning(model: nn.Module, variant: str, learning_rate: float) -> str | None:
    """A warning if a learning rate is outside the usual range."""
    low, high = (factor * default_learning_rate(model, variant) for factor in _USUAL_RANGE)
    if low <= learning_rate <= high:
        return None
    return (
        f"warning: LEARNING_RATE={learning_rate:g} is unusual for {variant} on this model; the "
        f"usual range is {low:.0e} to {high:.0e}"
    )
