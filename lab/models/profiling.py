"""What a model costs: parameters, multiply-adds, and floating-point operations of training."""

from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


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
