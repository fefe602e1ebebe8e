"""timm's modules with the constructors of model.py: what submissions are compared with.

`reference_class("Attention")` is correct; `reference_class("Attention", mistakes)` is a mutant that
makes the given mistakes. A mistake is an edit of timm's source or a change of its module, so no
correct implementation is written down here.
"""

import functools
import inspect
import sys
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from lab.exercise.timm_import import timm_vit

TIMM = {
    "PatchEmbed": timm_vit.PatchEmbed,
    "MLP": timm_vit.Mlp,
    "Attention": timm_vit.Attention,
    "Block": timm_vit.Block,
    "VisionTransformer": timm_vit.VisionTransformer,
}


@dataclass(frozen=True)
class Mistake:
    """A common mistake: an explanation, its usual cause, and how to make it.

    Attributes:
        name: short, unique within its part.
        says: what the code does and what follows from it, one sentence.
        because: the line of reasoning that leads to it.
        edits: replacements in the source of timm's method, (old, new) or (old, new, method).
        change: called with the finished module and the config.
        forward: used instead of timm's forward.
    """

    name: str
    says: str
    because: str
    edits: tuple[tuple[str, ...], ...] = ()
    change: Callable[[nn.Module, Any], object] | None = None
    forward: Callable[..., Any] | None = None

    @property
    def method(self) -> str:
        """The method of the student's class to look at."""
        named = [rest[0] for _, _, *rest in self.edits if rest]
        return named[0].replace("_pos_embed", "embed") if named else "forward"


class DoesNotApply(Exception):
    """A mistake cannot be made here: its line is missing, or another mistake has replaced it."""


@functools.cache
def reference_class(part: str, mistakes: tuple[Mistake, ...] = ()) -> type[nn.Module]:
    """timm's class for a part, called as model.py's: (config) or (config, drop_path).

    Raises: DoesNotApply.
    """
    base = TIMM[part]
    methods = _edited_methods(base, mistakes)

    class Reference(base):
        def __init__(self, config: Any, drop_path: float = 0.0):
            super().__init__(**_ARGUMENTS[part](config))
            self.config, self.drop_path_rate = config, drop_path
            if part == "PatchEmbed":  # attributes of model.py's that timm does not have so
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


def _edited_methods(base: type, mistakes: tuple[Mistake, ...]) -> dict[str, Callable]:
    """The methods of timm's class that the mistakes change, compiled from the edited source."""
    sources: dict[str, str] = {}
    replaced = [mistake.forward for mistake in mistakes if mistake.forward]
    if len(replaced) > 1 or (replaced and any(mistake.edits for mistake in mistakes)):
        raise DoesNotApply
    for mistake in mistakes:
        for old, new, *rest in mistake.edits:
            name = rest[0] if rest else "forward"
            source = sources.get(name) or _source_of(getattr(base, name))
            if old not in source:
                raise DoesNotApply(f"{base.__name__}.{name} has no {old!r}")
            sources[name] = source.replace(old, new)
    scope: dict[str, Any] = dict(vars(sys.modules[base.__module__]))
    for name, source in sources.items():
        exec(compile(source, f"<timm's {base.__name__}.{name}, edited>", "exec"), scope)
    methods = {name: scope[name] for name in sources}
    return methods | ({"forward": replaced[0]} if replaced else {})


@functools.cache
def _source_of(method: Callable) -> str:
    return textwrap.dedent(inspect.getsource(method))


def _patch_embed(c: Any) -> dict[str, Any]:
    return {
        "img_size": c.img_size, "patch_size": c.patch_size, "in_chans": c.in_chans,
        "embed_dim": c.embed_dim,
    }  # fmt: skip


def _mlp(c: Any) -> dict[str, Any]:
    return {"in_features": c.embed_dim, "hidden_features": int(c.embed_dim * c.mlp_ratio)}


def _attention(c: Any) -> dict[str, Any]:
    return {
        "dim": c.embed_dim, "num_heads": c.num_heads, "qkv_bias": c.qkv_bias,
        "attn_drop": c.attn_drop_rate,
    }  # fmt: skip


def _block(c: Any) -> dict[str, Any]:
    norm = partial(nn.LayerNorm, eps=c.norm_eps)
    more = {"mlp_ratio": c.mlp_ratio, "init_values": c.init_values, "norm_layer": norm}
    return _attention(c) | more


def _vision_transformer(c: Any) -> dict[str, Any]:
    names = (
        "img_size", "patch_size", "in_chans", "num_classes", "embed_dim", "depth", "num_heads",
        "mlp_ratio", "qkv_bias", "drop_rate", "attn_drop_rate", "init_values", "global_pool",
        "class_token", "no_embed_class",
    )  # fmt: skip
    norm = partial(nn.LayerNorm, eps=c.norm_eps)
    # The student's parameters replace all values, so timm need not initialize them.
    return {name: getattr(c, name) for name in names} | {"norm_layer": norm, "weight_init": "skip"}


_ARGUMENTS = {
    "PatchEmbed": _patch_embed,
    "MLP": _mlp,
    "Attention": _attention,
    "Block": _block,
    "VisionTransformer": _vision_transformer,
}
# The parts that a part builds on.
NEEDS = {"Block": ("Attention", "MLP"), "VisionTransformer": ("PatchEmbed", "Block")}
