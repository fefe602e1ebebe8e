"""Models cut into shards over the processes: FSDP, version 2, as Accelerate sets it up.

Files always hold whole tensors, so a run may go on, and its weights be used, without shards.
"""

from typing import Any

import torch
from accelerate import Accelerator, DistributedType
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.utils.parametrize import is_parametrized

from lab.errors import UserError
from lab.processes import first


def check_supported(
    accelerator: Accelerator, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Raises: UserError, for a way to divide a model that was never tried here."""
    kind = accelerator.distributed_type
    if kind in (DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM):
        raise UserError(f"{kind.value} is not supported here: take FSDP with fsdp_version: 2")
    if kind != DistributedType.FSDP:
        return
    if not accelerator.is_fsdp2:
        raise UserError("FSDP of version 1 is not supported here: set fsdp_version: 2")
    if type(optimizer) is not torch.optim.AdamW:
        raise UserError("FSDP was tried with AdamW alone: set OPTIMIZER to adamw")
    if any(is_parametrized(module) for module in model.modules()):
        raise UserError("MODE=lora does not work with FSDP: its model is small, run it without")


def whole(state: Any) -> Any:
    """A state, dicts and lists of tensors, without shards; all processes must call it.

    What was cut is put together, on the CPU, for the first process alone, which writes the files.
    """
    if isinstance(state, DTensor):
        value = state.full_tensor()
        return value.cpu() if first() else None
    if isinstance(state, dict):
        return {name: whole(value) for name, value in state.items()}
    if isinstance(state, list):
        return [whole(value) for value in state]
    return state


def cut_like(value: Any, like: Tensor) -> Any:
    """This process's shard of a whole tensor, if `like`, of the same shape, is cut into shards."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    value = value.to(like.device)
    # Each process has read the same file: none needs to send anything (src_data_rank).
    return distribute_tensor(value, like.device_mesh, like.placements, src_data_rank=None)


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """`optimizer.load_state_dict` for a whole state, whether or not the parameters are cut."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    entries = {
        number: {name: cut_like(value, parameters[number]) for name, value in entry.items()}
        for number, entry in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": entries})
