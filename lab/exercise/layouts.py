"""Finds which of a student's parameters plays the role of which parameter of a reference module.

Students may write a part in their own way: a Linear layer on unfolded patches instead of a
convolution, separate layers for queries, keys and values, other names, parameters transposed. A
layout says where each element of the reference's parameters lies among the student's. It is found
on element numbers instead of values, so it can be applied in both directions, and to gradients.
"""

import itertools
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

_ROLE = re.compile(
    r"(?:to|w|b|linear|fc|proj|project|lin)?_?(qkv|qk|kv|q|k|v)(?:uery|ueries|ey|eys|alue|alues)?_?"
    r"(?:heads?|proj|projection|linear|layers?|lin|w|fc|s|weight|bias)*",
    re.IGNORECASE,
)
# How a parameter outside of PyTorch's layers becomes a matrix W of W x: it is used as x @ W, or in
# einsum with the input's channels on the second to last or the first axis, or as W x.
_FORMS: tuple[Callable[[Tensor], Tensor], ...] = (
    lambda ids: ids.transpose(-2, -1).flatten(0, -2),
    lambda ids: ids.flatten(1).mT,
    lambda ids: ids.flatten(0, -2),
)
_KINDS = {nn.Linear: "Linear", nn.Conv2d: "Conv2d", nn.LayerNorm: "LayerNorm"}


@dataclass(frozen=True, eq=False)
class Slot:
    """A parameter of a module, or a tensor that looks like one."""

    name: str
    kind: str  # such as "Linear.weight"; "" for an nn.Parameter outside of PyTorch's layers
    tensor: Tensor
    registered: bool = True  # False: optimizers do not see it (a plain tensor, list or buffer)


Layout = dict[str, Tensor]  # the reference's parameter: numbers of elements in the student's slots


def slots(module: nn.Module) -> list[Slot]:
    """All parameters of a module in order of registration, then what is hidden from optimizers."""
    found: dict[int, Slot] = {}  # by the id of the tensor
    for path, owner in module.named_modules():
        kind = next((name for base, name in _KINDS.items() if isinstance(owner, base)), "")
        for leaf, value in owner.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            found.setdefault(id(value), Slot(name, f"{kind}.{leaf}" if kind else "", value))
    for path, owner in module.named_modules():
        plain = {k: v for k, v in vars(owner).items() if not k.startswith("_")}
        for leaf, value in {**plain, **owner._buffers}.items():
            for slot in _hidden(value, f"{path}.{leaf}" if path else leaf):
                found.setdefault(id(slot.tensor), slot)
    return list(found.values())


def _hidden(value: object, name: str) -> Iterator[Slot]:
    """Tensors in plain attributes, lists and dicts, where PyTorch does not look for parameters."""
    if isinstance(value, Tensor) and value.is_floating_point():
        yield Slot(name, "", value, registered=False)
    elif isinstance(value, nn.Module):
        for slot in slots(value):
            yield replace(slot, name=f"{name}.{slot.name}", registered=False)
    elif isinstance(value, list | tuple | dict):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        for key, item in items:
            yield from _hidden(item, f"{name}.{key}")


def flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.detach().reshape(-1) for t in tensors]) if tensors else torch.zeros(0)


def layouts(student: list[Slot], wanted: list[Slot], limit: int = 12) -> Iterator[Layout]:
    """Possible layouts, the most likely first; none if the student's parameters cannot be `wanted`.

    Where all names and shapes are the reference's there is only one, so a wrong order inside of a
    parameter (such as keys before queries) stays visible.
    """
    numbers, start = [], 0
    for slot in student:
        ids = torch.arange(start, start + slot.tensor.numel()).reshape(slot.tensor.shape)
        numbers.append(replace(slot, tensor=ids))
        start += slot.tensor.numel()
    shapes = {slot.name: slot.tensor.shape for slot in wanted}
    own = {slot.name: slot.tensor for slot in numbers if slot.registered}
    if {name: ids.shape for name, ids in own.items()} == shapes:
        yield own
        return
    candidates = (
        layout
        for merged in _merged_qkv(numbers)
        for items in _reshaped(merged, wanted)
        if (layout := _assign(items, wanted)) is not None
    )
    yield from itertools.islice(candidates, limit)


def _assign(items: list[Slot], wanted: list[Slot]) -> Layout | None:
    """Pairs slots with the reference's: by name, by the end of the name, by kind, by shape.

    Slots of the same kind and shape are paired in order of registration.
    """
    stages: list[Callable[[Slot], object]] = [
        lambda s: (s.name, s.tensor.shape),
        lambda s: (s.name.split(".")[-2:], s.tensor.shape),
        lambda s: (s.kind, s.tensor.shape),
        lambda s: [n for n in s.tensor.shape if n != 1],
    ]
    layout: Layout = {}
    items = list(items)
    for stage in stages:
        found = _grouped(items, stage)
        open_slots = [slot for slot in wanted if slot.name not in layout]
        for key, targets in _grouped(open_slots, stage).items():
            matches = found[key]
            if len(matches) != len(targets):
                matches = [slot for slot in matches if slot.registered]
            if len(matches) == len(targets):
                for target, slot in zip(targets, matches, strict=True):
                    layout[target.name] = slot.tensor.reshape(target.tensor.shape)
                    items.remove(slot)
    complete = len(layout) == len(wanted) and not any(slot.registered for slot in items)
    return layout if complete else None


def _grouped(items: list[Slot], key: Callable[[Slot], object]) -> dict[str, list[Slot]]:
    groups: dict[str, list[Slot]] = defaultdict(list)
    for slot in items:
        groups[repr(key(slot))].append(slot)
    return groups


def _merged_qkv(items: list[Slot]) -> Iterator[list[Slot]]:
    """Joins separate parameters for queries, keys and values (and heads) to one `qkv`.

    If the names do not say which is which, all orders are possible.
    """
    of_heads, of_modules = _families(items, heads=True), _families(items, heads=False)
    if of_heads or of_modules:
        choices = [of_heads] if of_heads == of_modules else [of_heads, of_modules]
        own = any(not slot.kind for family in of_heads.values() for _, slot in family)
        for families, form in itertools.product(choices, _FORMS if own else _FORMS[:1]):
            merged = list(items)
            for (path, leaf), family in families.items():
                _join(merged, family, path, leaf, form)
            yield merged
        return
    yield items
    squares = [s for s in items if s.kind == "Linear.weight" and len({*s.tensor.shape}) == 1]
    if len(squares) == 4:  # three for queries, keys, values in some order, and the output layer
        biases = [s for s in items if s.kind == "Linear.bias"][:3]
        for order in itertools.permutations(range(3)):
            merged = list(items)
            _join(merged, zip("qkv", [squares[i] for i in order], strict=True), "", "weight")
            if len(biases) == 3:
                _join(merged, zip("qkv", [biases[i] for i in order], strict=True), "", "bias")
            yield merged


def _families(items: list[Slot], heads: bool) -> dict[tuple[str, str], list[tuple[str, Slot]]]:
    """The slots for queries, keys and values with their roles, by the module they are in.

    heads: the numbered modules of a list are the heads of one attention layer.
    """
    found: dict[tuple[str, str], list[tuple[str, Slot]]] = defaultdict(list)
    for slot in items:
        parts = slot.name.split(".")
        roles = [(n, match[1].lower()) for n, part in enumerate(parts)
                 if (match := _ROLE.fullmatch(part))]  # fmt: skip
        if roles and not slot.kind.startswith("LayerNorm"):
            position, role = roles[-1]
            is_bias = slot.kind.endswith("bias") or (not slot.kind and slot.tensor.ndim < 2)
            path = ".".join(parts[:position])
            path = re.sub(r"(^|\.)\d+$", "", path) if heads else path
            found[path, "bias" if is_bias else "weight"].append((role, slot))
    complete = {"q", "k", "v"}
    return {key: family for key, family in found.items()
            if len(family) > 1 and {*"".join(role for role, _ in family)} == complete}  # fmt: skip


def _join(
    items: list[Slot], family: Iterable[tuple[str, Slot]], path: str, leaf: str,
    form: Callable[[Tensor], Tensor] | None = None,
) -> None:  # fmt: skip
    """Replaces slots by one whose rows are those for the queries, for the keys, for the values.

    form: of the parameters that are not in PyTorch's layers.
    """
    family, rows = list(family), {letter: [] for letter in "qkv"}
    for role, slot in family:
        ids = slot.tensor
        if leaf == "weight":
            ids = form(ids) if form and not slot.kind else ids.flatten(0, -2)
        for letter, ids_of_letter in zip(role, ids.tensor_split(len(role)), strict=True):
            rows[letter].append(ids_of_letter)
    joined = [ids for letter in "qkv" for ids in rows[letter]]
    if len({ids.shape[1:] for ids in joined}) == 1:
        first, *others = (slot for _, slot in family)
        name = f"{path}.qkv.{leaf}" if path else f"qkv.{leaf}"
        items[items.index(first)] = Slot(name, f"Linear.{leaf}", torch.cat(joined))
        for slot in others:
            items.remove(slot)


def _reshaped(items: list[Slot], wanted: list[Slot]) -> Iterator[list[Slot]]:
    """The slots with parameters transposed, or with a Linear layer seen as a convolution."""
    yield items
    shapes = [s.tensor.shape for s in wanted]
    choices = [[slot, *_other_shapes(slot, shapes)] for slot in items]
    for choice in itertools.islice(itertools.product(*choices), 1, 64):
        yield list(choice)


def _other_shapes(slot: Slot, shapes: list[torch.Size]) -> Iterator[Slot]:
    ids = slot.tensor
    if ids.ndim < 2 or (slot.kind and ids.ndim > 2):
        return
    matrices = [ids] if ids.ndim == 2 else [ids.flatten(1), ids.flatten(1).mT]
    if not slot.kind:
        matrices.append(ids.flatten(0, -2).mT)
        for tensor, leaf in (*((matrix, "weight") for matrix in matrices), (ids.flatten(), "bias")):
            if tensor.shape in shapes and tensor is not ids:
                yield replace(slot, tensor=tensor, kind=f"Linear.{leaf}")
    for out, channels, height, width in (shape for shape in shapes if len(shape) == 4):
        for matrix in matrices:
            if matrix.shape == (out, channels * height * width):
                pixels_last = matrix.reshape(out, channels, height, width)
                pixels_first = matrix.reshape(out, height, width, channels).permute(0, 3, 1, 2)
                for kernel in (pixels_last, pixels_first):
                    yield replace(slot, tensor=kernel, kind="Conv2d.weight")
