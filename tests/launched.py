"""Runs scripts in the processes of one launch, as two launches would, to save their start.

    torchrun --nproc-per-node 2 tests/launched.py train.py --epochs 1 + cnn_baseline.py --epochs 1

SHARDS=1: Accelerate gives FSDP to GPUs alone; the CPUs here are told to be some.
"""

import os
import runpy
import sys
from itertools import groupby
from pathlib import Path

import torch
from accelerate import DistributedType, PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from lab.processes import processes

if __name__ == "__main__":
    processes()
    if os.environ.get("SHARDS"):
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    torch.distributed.destroy_process_group = lambda: None  # the next script needs it
    for more, words in groupby(sys.argv[1:], lambda word: word == "+"):
        if not more:
            sys.argv = list(words)
            runpy.run_path(sys.argv[0], run_name="__main__")
