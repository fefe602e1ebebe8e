"""Blank figures of runs: drawing the real ones takes longer than most of the runs in the tests."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from PIL import Image

from lab.core import checkpoints, plots

_REAL = plots.plot_curves, plots.plot_confusion


def _draw_blank(path, *_):
    """Writes an image of one pixel."""
    content = io.BytesIO()
    Image.new("RGB", (1, 1)).save(content, "PNG")
    checkpoints.write_atomically(path, lambda scratch: scratch.write_bytes(content.getvalue()))


@contextmanager
def blank_figures() -> Iterator[None]:
    """Runs of this process get blank figures."""
    with mock.patch.multiple(plots, plot_curves=_draw_blank, plot_confusion=_draw_blank):
        yield


@contextmanager
def real_figures() -> Iterator[None]:
    """Inside of `blank_figures`, runs of this process get their figures."""
    curves, confusion = _REAL
    with mock.patch.multiple(plots, plot_curves=curves, plot_confusion=confusion):
        yield
