"""A web page for exploring attention maps: one file that needs no network and no server.

web/maps.html holds layout and behavior; this module fills in the data. Each value of a map becomes
one byte between the minimum and maximum of the map, which are stored exactly, so the page stays
small and the numbers it displays stay correct.
"""

import html
import io
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

from lab.attention.plots import COLORMAP, AttentionExample
from lab.core import web_page

_TEMPLATE = Path(__file__).parent / "web" / "maps.html"


def write_page(
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
    data = {"colors": web_page.base64(colors.tobytes()), "images": [_pack(x) for x in examples]}
    parts = {"notes": "\n".join(f"<p>{html.escape(note)}</p>" for note in notes)}
    web_page.write_page(path, _TEMPLATE, heading, parts, data)


def _pack(example: AttentionExample) -> dict[str, Any]:
    others = {name: m for name, m in example.maps.items() if name != example.raw_name}
    if not example.raw and not others:
        raise ValueError(f"{example.title!r} has no maps")
    # The mean of the heads comes first. It is computed here, before values are rounded to bytes.
    blocks = [np.concatenate([maps.mean(0, keepdims=True), maps]) for maps in example.raw]
    try:
        return {
            "title": example.title,
            "correct": example.correct,
            "picture": web_page.data_uri("image/png", _png(example.pixels)),
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


def _png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format="png")
    return file.getvalue()
