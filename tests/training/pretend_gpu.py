"""A device "gpu" without a GPU: its tensors are computed on the CPU but refuse to meet CPU tensors.

It reports what a real GPU would: a tensor on the wrong device raises, a moment at which the host
has to wait for the device is recorded together with the line that caused it, and kernel launches
are counted. It registers a backend of PyTorch, which cannot be undone, so it needs a process of its
own: see check_placement.py. The API that it uses is private; tests skip where it is missing.
"""

import sys
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_ROOT = Path(__file__).resolve().parents[2]
_aten = torch.ops.aten
_MOVES = {_aten._to_copy.default, _aten.copy_.default}
# Operations whose result, or its size, the host needs before it can continue.
_WAITS = {
    "aten._local_scalar_dense", "aten.nonzero", "aten.masked_select", "aten.equal",
    "aten.is_nonzero", "aten._unique2", "aten.unique_dim", "aten.unique_consecutive",
}  # fmt: skip
_JOINS = ("aten.cat", "aten.stack")  # unlike arithmetic, they take no scalars from the CPU


class _Backend:
    """What PyTorch asks of a device's module, as `torch.cuda` answers it."""

    _is_in_bad_fork = staticmethod(lambda: False)
    is_available = is_initialized = staticmethod(lambda: True)
    current_device = staticmethod(lambda: 0)
    device_count = staticmethod(lambda: 1)
    synchronize = staticmethod(lambda device=None: None)
    manual_seed_all = staticmethod(lambda seed: None)
    get_rng_state = staticmethod(lambda device=None: torch.get_rng_state())
    set_rng_state = staticmethod(lambda state, device=None: None)
    get_amp_supported_dtype = staticmethod(lambda: [torch.bfloat16, torch.float16])


class _Hooks(torch._C._acc.PrivateUse1Hooks):
    def is_available(self) -> bool:
        return True

    is_built = is_available

    def has_primary_context(self, index: int) -> bool:
        return True


class _Tensor(Tensor):
    """A tensor on the device; `values` is the CPU tensor that it stands for."""

    @staticmethod
    def __new__(cls, values: Tensor):
        made = Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), storage_offset=values.storage_offset(),
            dtype=values.dtype, device=DEVICE,
        )  # fmt: skip
        made.values = values
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})

    def __reduce_ex__(self, protocol):  # torch.save
        return self.values.__reduce_ex__(protocol)

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"gpu:{self.values!r}"


class Watch(TorchDispatchMode):
    """Inside it, tensors can be created on the device.

    Attributes:
        waits: how often the host waited, by reason and by line of this project.
        launches: the number of kernels that were launched.
    """

    current: "Watch | None" = None

    def __init__(self):
        super().__init__()
        self.waits: Counter[tuple[str, str]] = Counter()
        self.launches = 0

    def __enter__(self):
        Watch.current = self
        # Without it, torch.tensor([...], device="gpu") would first be a tensor on the CPU.
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error):
        Watch.current = None
        torch._C._set_only_lift_cpu_tensors(False)
        return super().__exit__(*error)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return _run(function, args, kwargs or {})


def _run(function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
    """Computes an operation on the CPU if a GPU could compute it."""
    values, _ = tree_flatten((args, kwargs))
    tensors = [x for x in values if isinstance(x, Tensor)]
    is_here = any(isinstance(x, _Tensor) for x in tensors)
    target = kwargs.get("device")
    creates = target is not None and torch.device(target).type == DEVICE.type
    if not is_here and not creates:
        return function(*args, **kwargs)
    if function in _MOVES:
        return _move(function, args, kwargs)
    name = str(function)
    if name.rpartition(".")[0] in _WAITS:
        _wait(name)
    if name.startswith(("aten.index.", "aten.index_put", "aten._index_put", "aten._unsafe_index")):
        _check_index(name, args)
    else:
        for x in tensors:
            if not isinstance(x, _Tensor) and (x.ndim or name.startswith(_JOINS)):
                _refuse(f"{name}: a tensor {tuple(x.shape)} on {x.device} meets the GPU")
    if any(isinstance(x, torch.Generator) and x.device.type == "cpu" for x in values):
        _refuse(f"{name}: a CPU generator cannot draw numbers on the GPU")
    if Watch.current and not function.is_view:
        Watch.current.launches += 1
    kwargs = {**kwargs, "device": CPU} if creates else kwargs
    known = {id(x.values): x for x in tensors if isinstance(x, _Tensor)}

    def wrap(x: Any) -> Any:
        if not isinstance(x, Tensor):
            return x
        return known[id(x)] if id(x) in known else _Tensor(x)  # in-place operations return x itself

    return tree_map(wrap, function(*tree_map(_unwrap, args), **tree_map(_unwrap, kwargs)))


def _move(function: Any, args: tuple, kwargs: dict[str, Any]) -> Tensor:
    """A copy between devices, or on one device to another type of numbers."""
    is_copy = function is _aten.copy_.default
    source = args[1] if is_copy else args[0]
    to = torch.device(args[0].device if is_copy else kwargs.get("device") or source.device)
    non_blocking = kwargs.get("non_blocking", is_copy and len(args) > 2 and args[2])
    if isinstance(source, _Tensor) and to.type == "cpu":
        _wait("copy to the CPU")
    elif not isinstance(source, _Tensor) and to.type == DEVICE.type and not non_blocking:
        _wait("copy to the GPU without non_blocking")
    if Watch.current:
        Watch.current.launches += 1
    plain = {key: value for key, value in kwargs.items() if key != "device"}
    out = function(*tree_map(_unwrap, args), **plain)
    if is_copy:
        return args[0]
    if out.untyped_storage().data_ptr() == _unwrap(source).untyped_storage().data_ptr():
        out = out.clone()
    return _Tensor(out) if to.type == DEVICE.type else out


def _check_index(name: str, args: tuple) -> None:
    """An index on the CPU is copied first; one of booleans makes the host count them."""
    for index in (x for x in args[1] if isinstance(x, Tensor)):
        if not isinstance(args[0], _Tensor):
            _refuse(f"{name}: a CPU tensor is indexed by one on the GPU")
        if not isinstance(index, _Tensor) and index.ndim:
            _wait(f"{name} with an index on the CPU")
        elif index.dtype in (torch.bool, torch.uint8) and not (
            len(args) > 2 and args[2].numel() == 1  # filling does not need the count
        ):
            _wait(f"{name} with a mask")


def _unwrap(x: Any) -> Any:
    return x.values if isinstance(x, _Tensor) else x


def _wait(reason: str) -> None:
    if Watch.current:
        Watch.current.waits[reason, _line()] += 1


def _refuse(what: str) -> None:
    raise RuntimeError(f"{what} at {_line()}")


def _line() -> str:
    """The innermost line of this project that is being executed, without these tests."""
    for frame in reversed(traceback.extract_stack()):
        path = Path(frame.filename)
        ours = path.is_relative_to(_ROOT) and not path.is_relative_to(sys.prefix)  # as in .venv
        if ours and path.parent != Path(__file__).parent:
            return f"{path.relative_to(_ROOT)}:{frame.lineno}"
    return "elsewhere"


CPU = torch.device("cpu")
_setup_privateuseone_for_python_backend("gpu", _Backend(), _Hooks())
DEVICE = torch.device("gpu", 0)
torch.__future__.set_swap_module_params_on_conversion(True)  # module.to(DEVICE) changes the class
