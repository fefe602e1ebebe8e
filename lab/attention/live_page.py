"""A web page on which a small ViT of model.py runs in the browser on what the user draws.

A single file that needs no network or framework: the weights as fp16, a forward pass in JavaScript
(web/vit.js), and four sections (web/draw.js, look.js, break.js, learn.js). Other models get the
page of precomputed maps in page.py.
"""

import html
import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lab.core import Run, UserError, checkpoints, plots, web_page
from lab.data import Preprocess
from model import VisionTransformer

_MAX_PARAMETERS = 4_000_000  # a larger model needs more than half a second per image in a browser

_TEMPLATE = Path(__file__).parent / "web" / "live.html"
_BLOCK = r"blocks\.\d+\.(norm[12]|attn\.(qkv|proj)|mlp\.fc[12])\.(weight|bias)"
_PARAMETER = re.compile(  # the parameters that web/vit.js supports
    rf"{_BLOCK}|blocks\.\d+\.ls[12]\.gamma|cls_token|pos_embed"
    r"|(patch_embed\.proj|norm|fc_norm|head)\.(weight|bias)"
)
# How a drawing becomes an image like those of the dataset: it is scaled into a box of so many
# pixels and centered by its center of mass (LeCun et al. 1998) or by its bounding box.
_DRAWING = {
    "mnist-5k": {"box": 20, "center": "mass"},
    "mnist": {"box": 20, "center": "mass"},
    "digits": {"box": 8, "center": "box"},
}


@dataclass(frozen=True)
class LiveExample:
    """An image to choose on the page. `correct` is None if the right class is unknown."""

    pixels: Tensor  # uint8 (C, S, S), as the model sees it before normalization
    title: str
    correct: bool | None


@dataclass(frozen=True)
class LiveContent:
    """What the page shows."""

    name: str  # of the model
    model: VisionTransformer
    preprocess: Preprocess
    classes: list[str]
    examples: list[LiveExample]
    dataset: str | None = None  # what it was trained on, if that is known
    run: Run | None = None  # the run that trained it, with its history and snapshots
    for_others: bool = False  # the readers are not those who trained it


def runs_in_browser(model: nn.Module) -> bool:
    """Whether `write_live_page` can show a model: a ViT of model.py with up to 4M parameters."""
    if not isinstance(model, VisionTransformer) or not model.config.num_classes:
        return False
    state = model.state_dict()
    size = sum(value.numel() for value in state.values())
    return size <= _MAX_PARAMETERS and all(_PARAMETER.fullmatch(name) for name in state)


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
    web_page.write_page(path, _TEMPLATE, title, parts, _pack(content))


def _pack(content: LiveContent) -> dict[str, Any]:
    model, preprocess = content.model, content.preprocess
    state = model.state_dict()
    states, opening = _states(content, state)
    return {
        "config": asdict(model.config),
        "preprocess": {**asdict(preprocess), "resized": preprocess.resized},
        "classes": content.classes,
        "dataset": content.dataset,
        "drawing": _DRAWING.get(content.dataset or ""),
        "ink_is_bright": preprocess.mean[0] < 0.5,
        "layout": [[name, list(value.shape)] for name, value in state.items()],
        "states": states,
        "opening": opening,
        "history": _history(content.run),
        "examples": _examples(content),
    }


def _states(content: LiveContent, state: dict[str, Tensor]) -> tuple[list[dict[str, Any]], int]:
    """The weights of all snapshots in order of their epochs, and the index of the model itself."""
    header, states = {"epoch": None, "val_accuracy": None}, []
    if content.run:
        best = content.run.folder / "best.safetensors"
        header = checkpoints.load_weights(best)[1]
        for path in sorted((content.run.folder / "snapshots").glob("epoch-*.safetensors")):
            weights, its_header = checkpoints.load_weights(path)
            shapes = {name: value.shape for name, value in weights.items()}
            if shapes != {name: value.shape for name, value in state.items()}:
                raise UserError(f"{path} has another architecture than {best}")
            if its_header["epoch"] != header["epoch"]:
                states.append({**_state_header(its_header), "weights": _half(weights, state)})
    own = {**_state_header(header), "weights": _half(state, state)}
    states = sorted([*states, own], key=lambda one: one["epoch"] or 0)
    return states, states.index(own)


def _state_header(header: dict[str, Any]) -> dict[str, Any]:
    return {"epoch": header["epoch"], "val_accuracy": header["val_accuracy"]}


def _half(weights: dict[str, Tensor], order: dict[str, Tensor]) -> str:
    """Weights as base64 of little-endian fp16, in the order of the names in `order`."""
    values = torch.cat([weights[name].detach().flatten().cpu().half() for name in order])
    return web_page.base64(values.numpy().astype("<f2").tobytes())


def _history(run: Run | None) -> list[dict[str, Any]]:
    keys = ("epoch", "train_accuracy", "val_accuracy")
    if run is None or not (run.folder / "history.csv").exists():
        return []
    return [{key: row[key] for key in keys} for row in run.history()]


@torch.no_grad()
def _examples(content: LiveContent) -> list[dict[str, Any]]:
    """Examples with the logits that PyTorch computes, against which the page checks its own."""
    if not content.examples:
        return []
    mean, std = (
        torch.tensor(values)[:, None, None]
        for values in (content.preprocess.mean, content.preprocess.std)
    )
    images = torch.stack([example.pixels for example in content.examples]).float() / 255
    device = next(content.model.parameters()).device
    logits = content.model(((images - mean) / std).to(device)).cpu()
    return [
        {
            "title": example.title,
            "correct": example.correct,
            "pixels": web_page.base64(example.pixels.contiguous().numpy().tobytes()),
            "logits": [round(value, 5) for value in row.tolist()],
        }
        for example, row in zip(content.examples, logits, strict=True)
    ]


def _kicker(content: LiveContent) -> str:
    """Model, size, data and accuracy in one line."""
    size = sum(p.numel() for p in content.model.parameters())
    parts = [content.name, f"{size:,} parameters"]
    if content.dataset:
        parts.append(f"trained on {content.dataset}")
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
        facts.append(
            f"Trained with: {config.get('command', 'an unknown command')} (started "
            f"{config.get('started', 'at an unknown time')})."
        )
        metrics = content.run.metrics() if content.run.finished else {}
        if interval := metrics.get("test_accuracy_95"):
            facts.append(
                f"Test accuracy {100 * metrics['test_accuracy']:.2f} % on {metrics['test_images']} "
                f"images; 95 % interval {100 * interval[0]:.1f} to {100 * interval[1]:.1f} %."
            )
    facts.append("Nothing leaves this page: it makes no request, and your browser enforces that.")
    return facts
