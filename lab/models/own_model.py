"""Checks an edited model.py before training, and explains its errors by the line that is wrong.

Some mistakes raise no error: layers in a Python list are not trained, and dropout that is not
switched off in evaluation mode makes every prediction random.
"""

import copy
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

_NEEDED = ("config", "group_matcher")  # for training
_EXPECTED = ("forward_features", "forward_head")  # for attention maps and heads
_OF_TORCH = {"_modules", "_parameters", "_buffers"}


def check_model(model: VisionTransformer, image_shape: tuple[int, ...], num_classes: int) -> None:
    """Tries a model of model.py on two random images; prints what is probably a mistake.

    Args:
        model: on the CPU; neither it nor PyTorch's random numbers change.
        image_shape: (C, H, W) of one image.
        num_classes: the number of logits.

    Raises: UserError, if it cannot be trained, saved or evaluated.
    """
    _check_parts(model)
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(2, *image_shape, generator=generator)
    wanted, state = (len(images), num_classes), torch.get_rng_state()
    too_large = "Lower EMBED_DIM or DEPTH."
    try:
        with runtime.explain_out_of_memory(too_large):
            model = copy.deepcopy(model)
    except (RuntimeError, TypeError) as error:
        raise UserError(
            f"model.py: the model cannot be copied ({runtime.first_line(error)}): keep tensors as "
            "parameters or buffers, and no generators, files or modules as attributes"
        ) from error
    with explain_errors(), runtime.explain_out_of_memory(too_large):
        _check_logits(model.train()(images), wanted)
        logits, again = model.eval()(images), model(images)
        _check_logits(logits, wanted)
    try:
        with runtime.explain_out_of_memory(too_large):
            F.cross_entropy(logits, torch.zeros(len(images), dtype=torch.long)).backward()
    except RuntimeError as error:  # its traceback does not lead into model.py
        raise UserError(
            f"model.py: the gradient cannot be computed: {runtime.first_line(error)}"
        ) from error
    torch.set_rng_state(state)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    gradients = [p.grad for p in trained.values() if p.grad is not None]
    if not all(value.isfinite().all() for value in (logits, *gradients)):
        raise UserError(
            "model.py gives NaN or infinite logits or gradients before any training: look for a "
            "division by zero, a logarithm or a square root"
        )
    if not torch.allclose(logits, again, atol=1e-4):
        print(
            "note: model.py gives different logits for the same image in evaluation mode. Pass "
            "training=self.training to F.dropout, and create layers in __init__, not in forward"
        )
    if unused := [name for name, p in trained.items() if p.grad is None]:
        more = f" and {len(unused) - 3} more" if len(unused) > 3 else ""
        print(f"note: no effect on the logits of model.py: {', '.join(unused[:3])}{more}")


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
    if missing := [name for name in _EXPECTED if not hasattr(model, name)]:
        names = " and ".join(missing)
        print(f"note: attention_viz.py and finetune.py need {names} in model.py")
    registered = set(model.parameters())
    for module in model.modules():
        for name, value in vars(module).items():
            items = value.values() if isinstance(value, dict) else value
            if name in _OF_TORCH or not isinstance(value, list | tuple | dict):
                continue
            layers = [item for item in items if isinstance(item, nn.Module)]
            parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
            if any(p not in registered for p in parameters):
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
