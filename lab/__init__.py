"""The lab's packages, one per concept; the scripts beside this folder show how to use them.

    core        constants as flags, runs and records, checkpoints, processes, statistics
    data        a dataset's name or folder -> batches on the device
    models      models by name, pretrained weights, LoRA, the matched CNN
    training    the training loop, optimizers, evaluation
    finetuning  which parameters to train; a linear probe on cached features
    attention   attention maps of ViT and Swin, their scores and pages
    sweep       hyperparameter search
    exercise    the hand-out for students, its checks, and the library of mistakes
    sharing     a model for classmates: the hub, ONNX, a page
    report      all records as tables and one page

Packages import only what another package's `__init__` exports, and never a script.
"""

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType


def _end_quietly(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Prints no traceback for Ctrl-C while a script's imports run."""
    if issubclass(kind, KeyboardInterrupt):
        print("\ninterrupted", file=sys.stderr)
    else:
        _usual_hook(kind, error, trace)


_usual_hook, sys.excepthook = sys.excepthook, _end_quietly


@contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Pauses Python's garbage collector, for code that creates many objects and no garbage."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


with without_garbage_collection():  # it would take a sixth of the seconds that the import takes
    import torch  # noqa: F401

    gc.freeze()  # later collections skip what exists now
