"""A web page to look through attention maps: one file, no network, no server.

How it looks and behaves is in attention_page.html beside this file; here the maps and pictures
are packed into it. A map is stored as one byte a value between its own smallest and largest,
which are kept as numbers, so a page stays small and its figures stay true.
"""

import html
import io
import json
from base64 import b64encode
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from lab.core import checkpoints

TEMPLATE = Path(__file__).with_name("page.html")
COLOURS = "inferno"  # perceptually uniform, and dark where there is nothing to see


@dataclass(frozen=True)
class PageImage:
    """One image with all its maps."""

    pixels: np.ndarray  # uint8 (S, S, 3)
    title: str  # such as "Bengal, predicted Abyssinian (87 %)"; may hold any characters
    correct: bool | None  # None: no label is known
    raw: list[np.ndarray]  # one for each block: float (heads, rows, columns), >= 0
    others: dict[str, np.ndarray]  # by name of the method, "rollout": float (rows, columns)


def write_page(path: Path, heading: str, notes: list[str], images: list[PageImage]) -> None:
    """Writes a page that shows every map of `images` over its picture.

    `notes` are paragraphs of plain text. Blocks may differ in heads, rows and columns, as in a
    Swin, and images in the methods that they have.

    Raises: ValueError, for no images, an image without a map, or a map with NaN or infinity.
    """
    if not images:
        raise ValueError("a page needs at least one image")
    table = matplotlib.colormaps[COLOURS](np.arange(256), bytes=True)[:, :3]  # (256, 3)
    data = {"colours": _base64(table.tobytes()), "images": [_packed(image) for image in images]}
    parts = {
        "heading": html.escape(heading),
        "notes": "\n".join(f"<p>{html.escape(note)}</p>" for note in notes),
        # no "<" in it, so nothing in it can end the script element that it stands in
        "data": json.dumps(data).replace("<", "\\u003c"),
    }
    page = TEMPLATE.read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"<!--{name}-->", part)
    # a file name that is not UTF-8 comes as lone surrogates, which no encoding can write
    content = page.encode("utf-8", errors="replace")
    checkpoints.write_atomically(path, lambda scratch: scratch.write_bytes(content))


def _packed(image: PageImage) -> dict[str, Any]:
    if not image.raw and not image.others:
        raise ValueError(f"{image.title!r} has no maps")
    # The mean comes first: of the values themselves, not of what the quantised heads would give
    blocks = [np.concatenate([maps.mean(0, keepdims=True), maps]) for maps in image.raw]
    try:
        return {
            "title": image.title,
            "correct": image.correct,
            "picture": "data:image/png;base64," + _base64(_png(image.pixels)),
            "blocks": [_quantised(maps) for maps in blocks],
            "others": {name: _quantised(one[None]) for name, one in image.others.items()},
        }
    except ValueError as error:
        raise ValueError(f"{image.title!r}: {error}") from error


def _quantised(maps: np.ndarray) -> dict[str, Any]:
    """Maps (count, rows, columns) as bytes, each between its own lowest and highest value."""
    if not np.isfinite(maps).all():
        raise ValueError("a map holds NaN or infinity")
    maps = maps.astype(np.float64)
    low, high = maps.min((1, 2)), maps.max((1, 2))  # (count,)
    span = np.where(high > low, high - low, 1)  # a flat map becomes zeros
    steps = (maps - low[:, None, None]) / span[:, None, None] * 255
    return {
        "rows": maps.shape[1],
        "columns": maps.shape[2],
        "low": low.tolist(),
        "high": high.tolist(),
        "values": _base64(steps.round().astype(np.uint8).tobytes()),
    }


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()


def _base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")
