"""What a model costs: parameters, multiply-adds, and floating-point operations of training."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab.core import UserError


def profile_model(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Counts a model's parameters, and its operations in matrix products and convolutions.

    Args:
        model: on the CPU.
        image_shape: (C, H, W) of one image, or (D,) for a head that reads features.

    Returns: `class`, `parameters` and `trainable_parameters`; `macs`, the multiply-adds of one
        image's forward pass; `training_flops`, the operations of its forward and backward pass.
    """
    image = torch.zeros(1, *image_shape)
    was_training = model.training
    model.eval()  # this image must not change the statistics of a batch norm
    with sdpa_kernel(SDPBackend.MATH):  # fused kernels recompute products, which would count twice
        with FlopCounterMode(display=False) as forward, torch.no_grad():
            model(image)
        with FlopCounterMode(display=False) as training:
            model(image).sum().backward()
    model.zero_grad()
    model.train(was_training)
    parameters = list(model.parameters())
    return {
        "class": type(model).__name__,
        "parameters": sum(p.numel() for p in parameters),
        "trainable_parameters": sum(p.numel() for p in parameters if p.requires_grad),
        "macs": forward.get_total_flops() // 2,
        "training_flops": training.get_total_flops(),
    }


def profile_small_images(
    model: nn.Module, image_shape: tuple[int, ...], epochs: int
) -> dict[str, Any]:
    """The entry `small_images` for a run that trains on smaller images in its first `epochs`.

    Raises: UserError, for a model that does not accept them.
    """
    if not epochs:
        return {}
    side = image_shape[-1]
    try:
        flops = profile_model(model, image_shape)["training_flops"]
    except (ValueError, AssertionError, RuntimeError) as error:  # model.py's and timm's errors
        raise UserError(
            f"PROGRESSIVE_RESIZE first trains on images of {side} pixels, which this model does "
            f"not accept ({str(error).rstrip('.')}). Set it to 0; a timm ViT accepts them with "
            'MODEL_ARGS="dynamic_img_size=True", where PATCH_SIZE is its patch size.'
        ) from error
    return {"small_images": {"epochs": epochs, "img_size": side, "training_flops": flops}}
