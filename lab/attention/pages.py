"""Two kinds of web page, each one file that needs no network: a live ViT, or attention maps.

The live page runs a small ViT of model.py in the browser on what the user draws: the weights as
fp16, a forward pass in JavaScript (web/vit.js), and four sections (web/draw.js, look.js, break.js,
learn.js). Other models get a page of precomputed maps (web/maps.html), in which each value becomes
one byte between the minimum and maximum of its map. These two are stored exactly, so the page stays
small and the numbers it displays stay correct.
"""

import html
import io
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from lab.attention.plots import COLORMAP, AttentionExample
from lab.core import Run, UserError, checkpoints, plots, runtime, web_page
from lab.data import Preprocess, datasets
from model import VisionTransformer

_WEB = Path(__file__).parent / "web"
_MAX_PARAMETERS = 4_000_000  # a larger model needs more than half a second per image in a browser
_BLOCK = r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
_PARAMETER = re.compile(  # the parameters that web/vit.js supports
    rf"{_BLOCK}|blocks\.\d+\.ls[12]\.gamma|cls_token|pos_embed"
    r"|(patch_embed\.proj|norm|fc_norm|head)\.(weight|bias)"
)
# How a drawing becomes an image like those of the dataset: it is scaled to fit a box of this many
# of its pixels and centered by its center of mass (LeCun et al. 1998) or by its bounding box.
_DRAWING = {
    "mnist-5k": {"box": 20, "center": "mass"},
    "mnist": {"box": 20, "center": "mass"},
    "digits": {"box": 8, "center": "box"},
}


# --- The page of maps ---


def write_maps_page(
    path: Path, heading: str, notes: list[str], examples: list[AttentionExample]
) -> None:
    """Writes a page that shows every map of the examples over its image.

    `notes` are paragraphs of plain text. Blocks may differ in heads, rows and columns, as in a
    Swin, and examples may differ in their methods.

    Raises: ValueError for no examples, an example without maps, or a map with NaN or infinity.
    """
    if not examples:
        raise ValueError("a page needs at least one image")
    colors = matplotlib.colormaps[COLORMAP](np.arange(256), bytes=True)[:, :3]  # (256, 3)
    images = [_maps_of(example) for example in examples]
    data = {"colors": web_page.base64(colors.tobytes()), "images": images}
    parts = {"notes": "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)}
    web_page.write_page(path, _WEB / "maps.html", heading, parts, data)


def _maps_of(example: AttentionExample) -> dict[str, Any]:
    others = {name: m for name, m in example.maps.items() if name != example.raw_name}
    if not example.raw and not others:
        raise ValueError(f"{example.title!r} has no maps")
    # The mean of the heads comes first. It is computed here, before values are rounded to bytes.
    blocks = [np.concatenate([maps.mean(0, keepdims=True), maps]) for maps in example.raw]
    picture = io.BytesIO()
    Image.fromarray(example.pixels).save(picture, format="png")
    try:
        return {
            "title": example.title,
            "correct": example.correct,
            "picture": web_page.data_uri("image/png", picture.getvalue()),
            "blocks": [_quantize(maps) for maps in blocks],
            "others": {name: _quantize(values[None]) for name, values in others.items()},
        }
    except ValueError as error:
        raise ValueError(f"{example.title!r}: {error}") from error


def _quantize(maps: np.ndarray) -> dict[str, Any]:
    """Maps (count, rows, columns) as bytes, each between its own minimum and maximum."""
    if not np.isfinite(maps).all():
        raise ValueError("a map contains NaN or infinity")
    maps = maps.astype(np.float64)
    low, high = maps.min((1, 2)), maps.max((1, 2))  # (count,)
    span = np.where(high > low, high - low, 1)  # a constant map becomes zeros
    steps = (maps - low[:, None, None]) / span[:, None, None] * 255
    return {
        "rows": maps.shape[1],
        "columns": maps.shape[2],
        "low": low.tolist(),
        "high": high.tolist(),
        "values": web_page.base64(steps.round().astype(np.uint8).tobytes()),
    }


# --- The live page ---


@dataclass(frozen=True)
class LiveContent:
    """What the live page shows; of the examples, it uses neither the confidence nor the maps."""

    name: str  # of the model
    model: VisionTransformer
    preprocess: Preprocess
    classes: list[str]
    examples: list[AttentionExample]
    dataset: str | None = None  # of the run; without a run, the one of the examples
    run: Run | None = None  # the run that trained it, with its history and snapshots
    for_others: bool = False  # for readers other than the person who trained it


def runs_in_browser(model: nn.Module) -> bool:
    """Whether `write_live_page` can show a model: a ViT with the layers of the original model.py,
    with biases, and up to 4M parameters.
    """
    if not isinstance(model, VisionTransformer) or not model.config.num_classes:
        return False
    config, state = model.config, model.state_dict()
    patch = (config.patch_size, config.patch_size)
    proj = dict(model.named_modules()).get("patch_embed.proj")
    size = sum(value.numel() for value in state.values())
    with_bias = (name for name in state if name.endswith(".weight") and ".qkv." not in name)
    return (
        size <= _MAX_PARAMETERS
        and all(_PARAMETER.fullmatch(name) for name in state)
        and isinstance(proj, nn.Conv2d)
        and proj.weight.shape == (config.embed_dim, config.in_chans, *patch)
        and proj.stride == patch  # patches do not overlap
        and all(name.removesuffix("weight") + "bias" in state for name in with_bias)
    )


def write_live_page(path: Path, content: LiveContent) -> None:
    """Writes the page. Raises: UserError, if the file or a record of the run cannot be used."""
    is_gray = content.model.config.in_chans == 1
    is_own = content.run and not content.for_others
    vit = "your own ViT" if is_own else "this ViT"
    title = f"Draw. {vit[0].upper()}{vit[1:]} answers." if is_gray else f"Show {vit} an image."
    subject = "The Vision Transformer that you trained" if is_own else "A Vision Transformer"
    parts = {
        "kicker": html.escape(_kicker(content)),
        "lead": f"{subject} is in this file and runs in your browser. See what it looks at, take "
        "it apart, and replay how it learned.",
        "palette": plots.css_palette(),
        "facts": "\n".join(f"<p>{html.escape(fact)}</p>" for fact in _facts(content)),
    }
    state = content.model.state_dict()
    data = {
        "config": asdict(content.model.config),
        "preprocess": {**asdict(content.preprocess), "resized": content.preprocess.resized},
        "classes": content.classes,
        "dataset": content.dataset,
        "drawing": _drawing(content),
        "ink_is_bright": content.preprocess.mean[0] < 0.5,
        "layout": [[name, list(value.shape)] for name, value in state.items()],
        **_states(content, state),
        "history": _history(content.run),
        "examples": _live_examples(content),
    }
    web_page.write_page(path, _WEB / "live.html", title, parts, data)


def _drawing(content: LiveContent) -> dict[str, Any] | None:
    """How drawings become images like those of the dataset; None: they do not."""
    if content.dataset not in _DRAWING:
        return None
    found = _DRAWING[content.dataset]
    scale = content.preprocess.img_size / datasets.native_size(content.dataset)
    return {**found, "box": round(found["box"] * scale)}


def _states(content: LiveContent, state: dict[str, Tensor]) -> dict[str, Any]:
    """The weights of all snapshots and of the model itself in order of their epochs.

    With them, the index of the model itself, and the number of snapshots.
    """

    def packed(weights: dict[str, Tensor], header: dict[str, Any]) -> dict[str, Any]:
        """The weights as base64 of little-endian fp16, in the order of the model's parameters."""
        values = torch.cat([weights[name].detach().flatten().cpu().half() for name in state])
        encoded = web_page.base64(values.numpy().astype("<f2").tobytes())
        known = {key: header[key] for key in ("epoch", "val_accuracy")}
        return {**known, "weights": encoded}

    header, states, snapshots = {"epoch": None, "val_accuracy": None}, [], []
    if content.run:
        best = content.run.folder / "best.safetensors"
        header = checkpoints.load_weights(best)[1]
        snapshots = sorted((content.run.folder / "snapshots").glob("epoch-*.safetensors"))
        for path in snapshots:
            weights, its_header = checkpoints.load_weights(path)
            different = {name for name in weights.keys() | state.keys()
                         if name not in weights or name not in state
                         or weights[name].shape != state[name].shape}  # fmt: skip
            if different == {"pos_embed"}:  # the page shows the model at another image size
                continue
            if different:
                raise UserError(f"{path} has a different architecture from {best}")
            if its_header["epoch"] != header["epoch"]:
                states.append(packed(weights, its_header))
    own = packed(state, header)
    states = sorted([*states, own], key=lambda one: one["epoch"] or 0)
    return {"states": states, "opening": states.index(own), "num_snapshots": len(snapshots)}


def _history(run: Run | None) -> list[dict[str, Any]]:
    keys = ("epoch", "train_accuracy", "val_accuracy")
    if run is None or not (run.folder / "history.csv").exists():
        return []
    return [{key: row[key] for key in keys} for row in run.history()]


@torch.no_grad()
def _live_examples(content: LiveContent) -> list[dict[str, Any]]:
    """Examples with the logits that PyTorch computes, against which the page checks its own."""
    if not content.examples:
        return []
    pixels = np.stack([example.pixels for example in content.examples])  # (B, S, S, 3)
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)[:, : content.model.config.in_chans]
    device = next(content.model.parameters()).device
    uncropped = replace(content.preprocess, crop_pct=1.0)  # the examples are already cropped
    logits = content.model(uncropped.normalize(pixels.to(device))).cpu()
    return [
        {
            "title": _live_title(example),
            "correct": example.correct,
            "pixels": web_page.base64(image.contiguous().numpy().tobytes()),
            "logits": [round(value, 5) for value in row.tolist()],
        }
        for example, image, row in zip(content.examples, pixels, logits, strict=True)
    ]


def _live_title(example: AttentionExample) -> str:
    label = example.label or example.name
    return label if example.correct is not False else f"{label}, predicted {example.prediction}"


def _kicker(content: LiveContent) -> str:
    """Model, size, data and accuracy in one line."""
    size = sum(p.numel() for p in content.model.parameters())
    parts = [content.name, f"{size:,} parameters"]
    if content.dataset:
        parts.append(f"{'trained on' if content.run else 'shown:'} {content.dataset}")
    if content.run and content.run.finished:
        metrics = content.run.metrics()
        if "test_accuracy" in metrics:
            parts.append(f"test accuracy {100 * metrics['test_accuracy']:.1f} %")
    return " · ".join(parts)


def _facts(content: LiveContent) -> list[str]:
    """Paragraphs at the end of the page: where its numbers come from."""
    facts = []
    if content.run:
        config = content.run.config()
        command = runtime.public_command(str(config.get("command", "an unknown command")))
        facts.append(
            f"Trained with: {command} (started {config.get('started', 'at an unknown time')})."
        )
        metrics = content.run.metrics() if content.run.finished else {}
        if interval := metrics.get("test_accuracy_95"):
            facts.append(
                f"Test accuracy {100 * metrics['test_accuracy']:.2f} % on {metrics['test_images']} "
                f"images; 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %."
            )
    facts.append("Nothing leaves this page: it makes no request, and your browser enforces that.")
    return facts
