"""Checks an edited model.py before training, and explains its errors by the line that is wrong.

Some mistakes raise no error: layers in a Python list are not trained, and dropout that stays on in
evaluation mode makes every prediction random.
"""

import json
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lab.core import UserError, runtime
from model import ConfigError, VisionTransformer

_NEEDED = ("forward_features", "forward_head", "group_matcher")  # methods that the lab calls


def check_model(model: VisionTransformer, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Tries a model of model.py on two random images; prints what is probably a mistake.

    Args:
        model: on the CPU; its state and PyTorch's random numbers do not change.
        image_shape: (C, H, W) of one image.
        num_classes: the number of logits.

    Raises: UserError, if it cannot be trained, saved or evaluated.
    """
    _check_parts(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *image_shape, generator=generator)
    was_training, state = model.training, torch.get_rng_state()
    model.eval()
    with explain_errors(), runtime.explain_out_of_memory("Lower EMBED_DIM or DEPTH."):
        with torch.no_grad():
            logits, again = model(images), model(images)
        _check_logits(logits, (len(images), num_classes))
        if not torch.allclose(logits, again, atol=1e-4, equal_nan=True):
            raise UserError(
                "model.py gives different logits for the same image in evaluation mode: pass "
                "training=self.training to F.dropout, and create layers in __init__, not in forward"
            )
        if not logits.isfinite().all():
            raise UserError(
                "model.py returns NaN or infinite logits before any training: look for a division "
                "by zero, a logarithm or a square root"
            )
        F.cross_entropy(model(images), torch.zeros(len(images), dtype=torch.long)).backward()
    unused = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    model.train(was_training)
    torch.set_rng_state(state)
    if unused:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        print(f"note: {', '.join(unused[:3])}{more} have no effect on the logits of model.py")


@contextmanager
def explain_errors() -> Iterator[None]:
    """Turns an error in model.py into a UserError with its line; other errors pass."""
    try:
        yield
    except (UserError, ConfigError):
        raise
    except Exception as error:
        file = sys.modules["model"].__file__
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == file]
        if not lines:
            raise
        reason = f"{type(error).__name__}: {runtime.first_line(error)}"
        raise UserError(f"{Path(file).name}, line {lines[-1]}: {reason}") from error


def _check_parts(model: VisionTransformer) -> None:
    """What can be seen without running the model. Raises: UserError."""
    kind = type(model).__name__
    if missing := [name for name in _NEEDED if not hasattr(model, name)]:
        raise UserError(
            f"model.py: {kind} lacks {', '.join(missing)}, which the lab needs: copy it from the "
            "model.py that you were given"
        )
    registered = set(model.parameters())
    for module in model.modules():
        for name, value in vars(module).items():
            items = value.values() if isinstance(value, dict) else value
            if name.startswith("_") or not isinstance(value, list | tuple | dict):
                continue
            layers = [item for item in items if isinstance(item, nn.Module)]
            if any(p not in registered for layer in layers for p in layer.parameters()):
                where = f"{type(module).__name__}.{name}"
                raise UserError(
                    f"model.py: {where} is a Python {type(value).__name__}, so its layers are not "
                    "trained: use nn.ModuleList or nn.ModuleDict"
                )
    for name, value in asdict(model.config).items():
        try:
            json.dumps(value)
        except TypeError:
            raise UserError(
                f"model.py: ViTConfig.{name} is {value!r}, which cannot be saved: use a number or "
                'text, such as act: str = "relu"'
            ) from None


def _check_logits(logits: object, wanted: tuple[int, int]) -> None:
    if not isinstance(logits, Tensor):
        raise UserError(
            f"model.py: forward must return logits of shape {wanted} for two images, but it "
            f"returned a value of type {type(logits).__name__}"
        )
    if logits.shape != wanted:
        raise UserError(
            f"model.py: forward must return logits of shape {wanted} for two images, but it "
            f"returned shape {tuple(logits.shape)}"
        )
