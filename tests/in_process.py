"""Runs a script in this process: starting another one takes seconds, mostly to import torch."""

import contextlib
import io
import runpy
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]


class Ended(NamedTuple):
    """How a script ended."""

    status: int
    out: str
    err: str


def run_script(words: list[str], place: Path = ROOT) -> Ended:
    """Runs a script of this project in the folder `place`; `words` are its name and arguments."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", words)
        patch.chdir(place)
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            try:
                runpy.run_path(str(ROOT / words[0]), run_name="__main__")
            except SystemExit as end:
                status = end.code
    return Ended(status, out.getvalue(), err.getvalue())
