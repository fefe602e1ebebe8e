"""The number formats of training: bf16, fp16, fp32, and TF32 for fp32 products on a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lab.core import UserError, runtime


def mixed_precision(precision: str) -> str:
    """The PRECISION constant as Accelerate names it: "bf16", "fp16" or, for fp32, "no".

    "auto" selects bf16 if the hardware supports it, else fp16 on a CUDA GPU, else fp32. Accelerate
    scales the loss for fp16, because small gradients would round to zero.

    Raises: UserError, for a precision that this hardware does not support.
    """
    device = runtime.process_state().device
    is_cuda, has_bf16 = device.type == "cuda", runtime.has_bf16(device)
    if precision == "auto":
        return "bf16" if has_bf16 else "fp16" if is_cuda else "no"
    if precision == "bf16" and is_cuda and not has_bf16:
        raise UserError(
            f"PRECISION=bf16: {torch.cuda.get_device_name(device)} has no bf16 hardware and would "
            "emulate it slowly. Set PRECISION=fp16 or auto"
        )
    if precision == "fp16" and not is_cuda:
        raise UserError(
            f"PRECISION=fp16 needs a CUDA GPU, and this is a {device.type} device. Set "
            "PRECISION=auto, bf16 or fp32"
        )
    return "no" if precision == "fp32" else precision


@contextmanager
def allow_tf32(device: torch.device) -> Iterator[None]:
    """Lets fp32 matrix products on a CUDA GPU use TF32, which rounds inputs to a 10-bit mantissa.

    Only for the model: the augmentation's coordinates would be wrong by up to 0.1 pixel.
    """
    if device.type != "cuda":
        yield
        return
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
