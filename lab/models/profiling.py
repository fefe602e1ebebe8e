"""What a model costs: parameters, multiply-adds, FLOPs of a training step, memory."""

import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab.core import UserError


def profile_model(model: nn.Module, image_shape: tuple[int, ...]) -> dict[str, Any]:
    """Counts for a run's records; operations by torch's counter, which sees the matrix products.

    Args:
        model: on the CPU.
        image_shape: (C, H, W) of one image, or (D,) for a head on features.

    Returns: `parameters`, `trainable_parameters`; `macs`, multiply-adds of one image's forward
        pass; `training_flops`, operations of one image's forward and backward pass.
    """
    image = torch.zeros(1, *image_shape)
    was_training = model.training
    model.eval()  # a batch norm must not take this image into its statistics
    with sdpa_kernel(SDPBackend.MATH):  # a fused kernel counts what it computes twice, twice
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
    """The entry `small_images` for a run whose first `epochs` see images of that smaller shape.

    Raises: UserError, for a model that does not take them.
    """
    if not epochs:
        return {}
    side = image_shape[-1]
    try:
        flops = profile_model(model, image_shape)["training_flops"]
    except (ValueError, AssertionError, RuntimeError) as error:  # the ways of our and timm's models
        raise UserError(
            f"PROGRESSIVE_RESIZE trains on images of {side} pixels first, which this model does "
            f"not take ({str(error).rstrip('.')}). Set it to 0; a ViT of timm's takes them with "
            'MODEL_ARGS="dynamic_img_size=True", where PATCH_SIZE is its patch size.'
        ) from error
    return {"small_images": {"epochs": epochs, "img_size": side, "training_flops": flops}}


def peak_memory_mb(device: torch.device) -> int | None:
    """The most memory so far, in MB: allocated on a GPU, resident for the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) // 10**6
    # Not getrusage first: on Linux a process inherits there what the one that started it held.
    status = Path("/proc/self/status")
    if status.exists() and (found := re.search(r"VmHWM:\s+(\d+) kB", status.read_text())):
        return int(found[1]) * 1024 // 10**6
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak // 10**6 if sys.platform == "darwin" else peak // 10**3


def has_bf16(device: torch.device) -> bool:
    """Whether bf16 products run in hardware there."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return False
