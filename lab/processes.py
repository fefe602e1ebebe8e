"""The processes that train together: one, or as many as accelerate or torchrun started."""

import torch
from accelerate import PartialState


def processes() -> PartialState:
    """Accelerate's view of them: `process_index`, `num_processes`, `device`, ...

    Accelerate lets processes on CPUs find each other only when it is told that CPUs are meant.
    """
    return PartialState(cpu=not torch.accelerator.is_available())
