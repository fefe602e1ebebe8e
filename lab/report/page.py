"""The report's web page: one file that holds every run, no network, no server.

How it looks and behaves is in the folder report/ beside this file; here the content is checked and
packed into it. The heading and the summary are plain HTML, so that they can be read even where
scripts are switched off; all the rest travels as JSON and is drawn by the page.
"""

import html
import json
import math
from pathlib import Path
from typing import Any

from lab.core import checkpoints

TEMPLATE = Path(__file__).parent
SCRIPTS = ("tables.js", "chart.js", "sections.js")  # each uses what stands before it
CURVE_DIGITS = 5  # significant: more than a chart can show; curves are most of a large page


def write_page(path: Path, content: dict[str, Any]) -> None:
    """Writes a page that shows `content`, which lab/report/content.py describes and builds.

    Raises: ValueError, for NaN or infinity, naming the place; what is missing should be None.
    """
    packed = _packed(content, "")
    for run in packed["runs"]:
        run["curves"] = {name: _short(values) for name, values in run["curves"].items()}
    head = {name: packed.pop(name) for name in ("heading", "made", "summary")}
    parts = {
        "style": (TEMPLATE / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((TEMPLATE / name).read_text(encoding="utf-8") for name in SCRIPTS),
        "heading": html.escape(head["heading"]),
        "made": html.escape(head["made"]),
        "summary": "\n".join(f"<li>{_unbroken(sentence)}</li>" for sentence in head["summary"]),
        # no "<" in it, so nothing in it can end the script element that it stands in
        "data": json.dumps(packed, separators=(",", ":")).replace("<", "\\u003c"),
    }
    page = (TEMPLATE / "page.html").read_text(encoding="utf-8")
    for name, part in parts.items():
        page = page.replace(f"<!--{name}-->", part)
    # a file name that is not UTF-8 comes as lone surrogates, which no encoding can write
    written = page.encode("utf-8", errors="replace")
    checkpoints.write_atomically(path, lambda scratch: scratch.write_bytes(written))


def _unbroken(sentence: str) -> str:
    """A sentence as HTML, in which no line ends between a number and its unit."""
    return html.escape(sentence).replace(" %", "&nbsp;%")


def _packed(value: Any, place: str) -> Any:
    """A copy of `value`, all of whose numbers are finite; `place` is its name in an error."""
    if isinstance(value, dict):
        return {key: _packed(part, f"{place}.{key}".lstrip(".")) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_packed(part, f"{place}[{index}]") for index, part in enumerate(value)]
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{place} is {value}: JSON has no such number, None says what is missing")
    return value


def _short(values: list[float | None]) -> list[float | None]:
    """The values of a curve, without digits that nobody sees."""
    return [
        float(f"{value:.{CURVE_DIGITS}g}") if isinstance(value, float) else value
        for value in values
    ]
