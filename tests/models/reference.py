"""Models of other libraries with random weights, saved as those libraries save them."""

import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from lab.core.checkpoints import save_weights
from lab.models.registry import model_header
from tests.shaken import shaken

ROOT = Path(__file__).resolve().parents[2]
DIGITS = [str(digit) for digit in range(10)]
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4}
SMALL_SWIN = {"embed_dim": 16, "depths": (1, 1, 2, 1), "num_heads": (1, 2, 4, 8)}
TINY = {"embed_dim": 32, "depth": 1, "num_heads": 2}


def timms(name, seed=0, **options):
    return shaken(timm.create_model(name, **options), seed)


def saved(model, path):
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, path)
    return str(path)


def exported(model, folder, **options):
    """A folder as timm publishes it."""
    options = {k: list(v) if isinstance(v, tuple) else v for k, v in options.items()}
    timm.models.save_for_hf(model, str(folder), model_args=options, safe_serialization=True)
    assert {"config.json", "model.safetensors"} <= {p.name for p in folder.iterdir()}
    return str(folder)


def loaded_by_timm(name, path, size, channels=3, **options):
    """timm's own way to load a file."""
    path = Path(path) / "model.safetensors" if Path(path).is_dir() else path
    state = load_file(path)
    head = next((len(state[k]) for k in ("head.weight", "head.fc.weight") if k in state), 0)
    overlay = {"file": str(path), "num_classes": head, "input_size": (channels, size, size)}
    overlay |= {"custom_load": False, "first_conv": None}
    model = timm.create_model(
        name, pretrained=True, num_classes=head, pretrained_cfg_overlay=overlay, **options
    )
    return model.eval()


@torch.no_grad()
def assert_same_logits(pretrained, reference, size, channels=3, atol=1e-5):
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(2 if size > 100 else 8, channels, size, size, generator=generator)
    expected = reference(images)
    assert expected.std() > 1e-3  # the logits differ
    assert not pretrained.model.training
    torch.testing.assert_close(pretrained.model(images), expected, atol=atol, rtol=1e-5)


def assert_preprocess_of(pretrained, reference, size=None):
    """What timm itself says about a model's images."""
    data = timm.data.resolve_data_config({}, model=reference)
    found = pretrained.preprocess
    assert found.mean == pytest.approx(data["mean"])
    assert found.std == pytest.approx(data["std"])
    assert found.img_size == (size or data["input_size"][-1])
    assert found.crop_pct == data["crop_pct"]
    assert found.interpolation == data["interpolation"]


def save_run(folder, model, classes, preprocess):
    folder.mkdir()
    header = {**model_header(model, classes, preprocess), "epoch": 3}
    save_weights(folder / "best.safetensors", model.state_dict(), header)
    return str(folder)


def google(seed, head=7):
    """Random arrays in the layout of google-research/vision_transformer, and timm's arguments."""
    rng = np.random.default_rng(seed)
    heads, width, patch, grid = (int(rng.choice(c)) for c in ([1, 3], [4, 8], [4, 8], [1, 2, 4]))
    dim, hidden, depth = heads * width, int(rng.choice([24, 40])), int(rng.choice([1, 3, 11]))
    shapes = {
        "cls": (1, 1, dim), "embedding/kernel": (patch, patch, 3, dim), "embedding/bias": (dim,),
        "Transformer/posembed_input/pos_embedding": (1, grid**2 + 1, dim),
        "Transformer/encoder_norm/scale": (dim,), "Transformer/encoder_norm/bias": (dim,),
        "head/kernel": (dim, head), "head/bias": (head,),
    }  # fmt: skip
    for layer in range(depth):
        block = f"Transformer/encoderblock_{layer}/"
        for part in ("query", "key", "value"):
            shapes[f"{block}MultiHeadDotProductAttention_1/{part}/kernel"] = (dim, heads, width)
            shapes[f"{block}MultiHeadDotProductAttention_1/{part}/bias"] = (heads, width)
        shapes[f"{block}MultiHeadDotProductAttention_1/out/kernel"] = (heads, width, dim)
        shapes[f"{block}MultiHeadDotProductAttention_1/out/bias"] = (dim,)
        for number in (0, 2):
            shapes[f"{block}LayerNorm_{number}/scale"] = (dim,)
            shapes[f"{block}LayerNorm_{number}/bias"] = (dim,)
        for number, (i, o) in enumerate(((dim, hidden), (hidden, dim))):
            shapes[f"{block}MlpBlock_3/Dense_{number}/kernel"] = (i, o)
            shapes[f"{block}MlpBlock_3/Dense_{number}/bias"] = (o,)
    arrays = {n: rng.normal(0, 0.3, shape).astype(np.float32) for n, shape in shapes.items()}
    options = {"img_size": patch * grid, "patch_size": patch, "embed_dim": dim, "depth": depth,
               "num_heads": heads, "mlp_ratio": hidden / dim, "num_classes": head}  # fmt: skip
    return arrays, options


class Code:
    """A pickle that creates a folder when it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)
