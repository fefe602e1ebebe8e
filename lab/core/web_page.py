"""Self-contained web pages: one file that needs no network or server and runs only its own code.

A page is written as usual, as HTML beside its style and scripts. `write_page` puts everything into
one file, with a content security policy that makes the browser block all requests and all other
code.
"""

import hashlib
import html
import json
import re
from base64 import b64encode
from pathlib import Path
from typing import Any

from lab.core.checkpoints import write_atomically

_HEAD = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
  style-src {styles}; script-src {scripts}">
<link rel="icon" href="data:,">
<title>{title}</title>
"""


def write_page(
    path: Path, template: Path, title: str, parts: dict[str, str], data: dict[str, Any]
) -> None:
    """Writes a page into one file.

    Args:
        path: the file.
        template: the HTML that follows the <title> element. Its <link rel="stylesheet" href="..">
            and <script src=".."> name files beside it.
        title: plain text; also fills <!--title-->.
        parts: HTML that fills <!--name-->, by name.
        data: fills <!--data-->, the content of a script element of type application/json.

    Raises: UserError if the file cannot be written; ValueError for NaN or infinity in `data`.
    """

    def inline(found: re.Match) -> str:
        text = (template.parent / (found[1] or found[2])).read_text(encoding="utf-8")
        return f"<style>{text}</style>" if found[1] else f'<script>"use strict";\n{text}</script>'

    page = template.read_text(encoding="utf-8")
    page = re.sub(
        r'<link rel="stylesheet" href="(.*?)">|<script src="(.*?)"></script>', inline, page
    )
    # Without "<", no text can end the script element that contains it.
    packed = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {**parts, "title": html.escape(title), "data": packed}
    page = re.sub(r"<!--(\w+)-->", lambda found: parts[found[1]], page)
    hashes = {
        f"{tag}s": " ".join(map(_hash, re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)))
        for tag in ("style", "script")
    }
    page = _HEAD.format(title=parts["title"], **hashes) + page
    # A file name that is not valid Unicode contains surrogates, which UTF-8 cannot encode.
    encoded = page.encode("utf-8", errors="replace")
    write_atomically(path, lambda scratch: scratch.write_bytes(encoded))


def base64(content: bytes) -> str:
    return b64encode(content).decode("ascii")


def data_uri(kind: str, content: bytes) -> str:
    """A file as a data URI, such as "data:image/png;base64,...". `kind` is its media type."""
    return f"data:{kind};base64,{base64(content)}"


def _hash(text: str) -> str:
    return f"'sha256-{base64(hashlib.sha256(text.encode()).digest())}'"
