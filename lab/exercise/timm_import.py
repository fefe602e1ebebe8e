"""timm's Vision Transformer, imported without PyTorch's compiler.

timm and torchvision load the compiler (torch._dynamo) when they are imported, for two decorators.
It is not needed here and takes half of the time of a check, so it is replaced meanwhile.
"""

import sys
import types
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def _without_compiler() -> Iterator[None]:
    package = types.ModuleType("torch._dynamo")
    utils = types.ModuleType("torch._dynamo.utils")
    package.__path__, utils.is_compile_supported = [], lambda device: False
    disable = torch.compiler.disable
    sys.modules |= {"torch._dynamo": package, "torch._dynamo.utils": utils}
    torch.compiler.disable = lambda fn=None, *_, **__: fn if fn else lambda function: function
    try:
        yield
    finally:
        torch.compiler.disable = disable
        del sys.modules["torch._dynamo"], sys.modules["torch._dynamo.utils"]


if not {"timm", "torchvision", "torch._dynamo"} & set(sys.modules):
    try:
        with _without_compiler():
            import timm.models.vision_transformer  # noqa: F401
    except (ImportError, AttributeError):  # a version that needs more of it
        pass
from timm.models import vision_transformer as timm_vit  # noqa: E402

__all__ = ["timm_vit"]
