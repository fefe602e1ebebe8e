"""timm's modules with the constructors of model.py: what submissions are compared with.

`reference_class("Attention")` is correct; `reference_class("Attention", mistakes)` is a mutant that
makes the given mistakes. A mistake is an edit of timm's source or a change of its module, so no
correct implementation is written down here.
"""

import functools
import inspect
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch
from torch import nn


@contextmanager
def _without_compiler() -> Iterator[None]:
    """Replaces PyTorch's compiler (torch._dynamo), which timm and torchvision load on import.

    They need it only for two decorators, and loading it takes half of the time of a check.
    """
    package = types.ModuleType("torch._dynamo")
    utils = types.ModuleType("torch._dynamo.utils")
    package.__path__, utils.is_compile_supported = [], lambda device: False
    disable = torch.compiler.disable
    sys.modules |= {"torch._dynamo": package, "torch._dynamo.utils": utils}
    torch.compiler.disable = lambda fn=None, *_, **__: fn if fn else lambda function: function
    try:
        yield
    finally:
        torch.compiler.disable = disable
        del sys.modules["torch._dynamo"], sys.modules["torch._dynamo.utils"]


if not {"timm", "torchvision", "torch._dynamo"} & set(sys.modules):
    try:
        with _without_compiler():
            import timm.models.vision_transformer  # noqa: F401
    except (ImportError, AttributeError):  # a version that needs more of it
        pass
from timm.models import vision_transformer as timm_vit  # noqa: E402

# The parts that a part builds on.
NEEDS = {
    "Block": ("Attention", "MLP"),
    "VisionTransformer": ("PatchEmbed", "Attention", "MLP", "Block"),
}
TIMM = {
    "PatchEmbed": timm_vit.PatchEmbed,
    "MLP": timm_vit.Mlp,
    "Attention": timm_vit.Attention,
    "Block": timm_vit.Block,
    "VisionTransformer": timm_vit.VisionTransformer,
}
# timm's methods that mistakes edit; in the other classes it is only forward.
_METHODS = {"VisionTransformer": ("_pos_embed", "forward_features", "forward_head")}


@dataclass(frozen=True, eq=False)
class Mistake:
    """A common mistake: an explanation, its usual cause, and how to make it.

    Attributes:
        says: what the code does and what follows from it, one sentence.
        because: the line of reasoning that leads to it.
        edits: replacements in the source of timm's methods; each is in one of them only.
        change: called with the finished module and the config.
        forward: used instead of timm's forward.
        name: short, unique within its part; see named.
    """

    says: str
    because: str
    edits: dict[str, str] = field(default_factory=dict)
    change: Callable[[nn.Module, Any], object] | None = None
    forward: Callable[..., Any] | None = None
    name: str = ""


_Entry = TypeVar("_Entry")


def named(table: dict[str, _Entry]) -> tuple[_Entry, ...]:
    """The mistakes of a table, each with its name, in the table's order."""
    return tuple(replace(mistake, name=name) for name, mistake in table.items())


class DoesNotApply(Exception):
    """A mistake cannot be made here: its line is missing, or another mistake has replaced it."""


@functools.cache
def reference_class(part: str, mistakes: tuple[Mistake, ...] = ()) -> type[nn.Module]:
    """timm's class for a part, called as model.py's: (config) or (config, drop_path).

    Raises: DoesNotApply.
    """
    base = TIMM[part]
    methods = _edited_methods(part, mistakes)

    class Reference(base):
        def __init__(self, config: Any, drop_path: float = 0.0):
            super().__init__(**_arguments(part, config))
            self.config, self.drop_path_rate = config, drop_path
            if part == "PatchEmbed":  # model.py's values; timm's differ
                self.patch_size, self.dynamic_img_size = config.patch_size, False
            for module in self.modules():
                if hasattr(module, "fused_attn"):
                    module.fused_attn = False  # mistakes edit the attention that is written out
            for mistake in mistakes:
                if mistake.change:
                    mistake.change(self, config)

    for name, method in methods.items():
        setattr(Reference, name, method)
    return Reference


def _edited_methods(part: str, mistakes: tuple[Mistake, ...]) -> dict[str, Callable]:
    """The methods of timm's class that the mistakes change, compiled from the edited source."""
    replaced = [mistake.forward for mistake in mistakes if mistake.forward]
    if len(replaced) > 1 or (replaced and any(mistake.edits for mistake in mistakes)):
        raise DoesNotApply
    sources = _sources(part)
    edits = [edit for mistake in mistakes for edit in mistake.edits.items()]
    for old, new in edits:
        name = next((name for name, source in sources.items() if old in source), None)
        if name is None:
            raise DoesNotApply(f"{part} has no {old!r}")
        sources = sources | {name: sources[name].replace(old, new)}
    scope: dict[str, Any] = dict(vars(sys.modules[TIMM[part].__module__]))
    methods = {"forward": replaced[0]} if replaced else {}
    for name, source in sources.items():
        if source != _sources(part)[name]:
            exec(compile(source, f"<timm's {part}.{name}, edited>", "exec"), scope)
            methods[name] = scope[name]
    return methods


@functools.cache
def _sources(part: str) -> dict[str, str]:
    """The source of timm's methods that mistakes edit."""
    methods = {name: getattr(TIMM[part], name) for name in _METHODS.get(part, ("forward",))}
    return {name: textwrap.dedent(inspect.getsource(m)) for name, m in methods.items()}


def method_of(part: str, mistake: Mistake) -> str:
    """The method of the student's class that the first edit of a mistake is in."""
    first = next(iter(mistake.edits), None)
    names = (name for name, source in _sources(part).items() if first and first in source)
    return next(names, "forward").replace("_pos_embed", "embed")


def _arguments(part: str, c: Any) -> dict[str, Any]:
    """The arguments of timm's constructor for a configuration."""
    if part == "PatchEmbed":
        return {
            "img_size": c.img_size, "patch_size": c.patch_size, "in_chans": c.in_chans,
            "embed_dim": c.embed_dim,
        }  # fmt: skip
    if part == "MLP":
        return {"in_features": c.embed_dim, "hidden_features": int(c.embed_dim * c.mlp_ratio)}
    norm = functools.partial(nn.LayerNorm, eps=c.norm_eps)
    if part == "VisionTransformer":
        names = (
            "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads",
            "mlp_ratio", "qkv_bias", "drop_rate", "attn_drop_rate", "init_values", "global_pool",
            "class_token", "no_embed_class",
        )  # fmt: skip
        # The student's parameters replace all values, so timm need not initialize them.
        more = {"norm_layer": norm, "weight_init": "skip"}
        return {name: getattr(c, name) for name in names} | more
    attention = {
        "dim": c.embed_dim, "num_heads": c.num_heads, "qkv_bias": c.qkv_bias,
        "attn_drop": c.attn_drop_rate,
    }  # fmt: skip
    if part == "Attention":
        return attention
    more = {"mlp_ratio": c.mlp_ratio, "init_values": c.init_values, "norm_layer": norm}
    return attention | more
