"""Converts weights between other libraries and model.py, and says what model.py does not cover.

model.py has timm's parameter names, so timm's checkpoints need no conversion: pretrained.py loads
them strictly. transformers and Google's original JAX code have other names. The tests in
tests/models check that converted weights give the logits of their own library.
"""

import math
import re
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from lab.core import UserError
from model import ViTConfig

_State = dict[str, Tensor]

_TO_TRANSFORMERS = {  # parts of our names -> those in transformers' files, without "vit."
    "cls_token": "embeddings.cls_token",
    "pos_embed": "embeddings.position_embeddings",
    "patch_embed.proj": "embeddings.patch_embeddings.projection",
    "blocks.": "encoder.layer.",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "norm.": "layernorm.",
    "attn.q_proj": "attention.attention.query",  # qkv in model.py
    "attn.k_proj": "attention.attention.key",
    "attn.v_proj": "attention.attention.value",
    "attn.proj": "attention.output.dense",
    "mlp.fc1": "intermediate.dense",
    "mlp.fc2": "output.dense",
    "head.": "classifier.",
}
_FROM_TRANSFORMERS = {theirs: ours for ours, theirs in _TO_TRANSFORMERS.items()} | {
    "layers.": "blocks.",  # as of version 5, models in memory have these names
    "attention.q_proj": "attn.q_proj",
    "attention.k_proj": "attn.k_proj",
    "attention.v_proj": "attn.v_proj",
    "attention.o_proj": "attn.proj",
}
_UNUSED = ("pooler.", "decoder.", "embeddings.mask_token")  # of transformers' other heads
_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16}  # of ViT-Ti, S, B and L; wider ViTs differ


def from_transformers(state: _State, config: dict[str, Any]) -> tuple[_State, ViTConfig, list[str]]:
    """Converts a `ViTModel` or `ViTForImageClassification` of transformers, given its config.json.

    Returns: the weights with timm's names, their config, and the names that a classifier does not
        use.
    Raises: UserError, for a model that is not a plain ViT.
    """
    if config.get("model_type") != "vit" or config.get("hidden_act", "gelu") != "gelu":
        kind = f"{config.get('model_type')!r} with {config.get('hidden_act', 'gelu')!r}"
        raise UserError(
            f"its config.json describes the transformers model {kind}; only 'vit' with 'gelu' can "
            "be loaded. timm has most other models, under its own names."
        )
    named: _State = {}
    unused = []
    for full, value in state.items():
        name = full.removeprefix("vit.")
        if name.startswith(_UNUSED):
            unused.append(full)
            continue
        for theirs, ours in _FROM_TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        named[name] = value
    for first in [name for name in named if "attn.q_proj" in name]:
        parts = [named.pop(first.replace("q_proj", f"{part}_proj"), None) for part in "qkv"]
        if any(part is None for part in parts):
            raise UserError(f"{first}: the weights of query, key or value are missing")
        named[first.replace("q_proj", "qkv")] = torch.cat(parts)
    heads, eps = config.get("num_attention_heads", 12), config.get("layer_norm_eps", 1e-12)
    return named, config_of(named, heads, eps), unused


def to_transformers(state: _State, config: ViTConfig) -> _State:
    """Weights of model.py as a ViTForImageClassification names them.

    transformers' ViT has neither LayerScale, which is folded into the layer before it, nor a class
    token without a position, which gets the position zero.
    """
    state = dict(state)
    if config.no_embed_class:
        zero = state["pos_embed"].new_zeros(1, 1, config.embed_dim)
        state["pos_embed"] = torch.cat([zero, state["pos_embed"]], dim=1)
    for name in [name for name in state if name.endswith(".gamma")]:
        gamma = state.pop(name)
        layer = name.replace("ls1.gamma", "attn.proj").replace("ls2.gamma", "mlp.fc2")
        state[f"{layer}.weight"] = gamma[:, None] * state[f"{layer}.weight"]
        state[f"{layer}.bias"] = gamma * state[f"{layer}.bias"]
    for name in [name for name in state if "attn.qkv" in name]:
        parts = state.pop(name).chunk(3)
        for part, value in zip("qkv", parts, strict=True):
            state[name.replace("attn.qkv", f"attn.{part}_proj")] = value
    found = {}
    for name, value in state.items():
        for ours, theirs in _TO_TRANSFORMERS.items():
            name = name.replace(ours, theirs)
        found[name if name.startswith("classifier.") else f"vit.{name}"] = value
    return found


def from_processor(processor: dict[str, Any]) -> dict[str, Any]:
    """Converts transformers' preprocessor_config.json to timm's names; {} for none."""
    if not processor:
        return {}
    normalized = processor.get("do_normalize", True)
    mean = processor.get("image_mean", [0.5] * 3) if normalized else [0.0] * 3
    std = processor.get("image_std", [0.5] * 3) if normalized else [1.0] * 3
    # transformers normalizes after rescaling by this factor, we after scaling pixels to [0, 1].
    factor = processor.get("rescale_factor", 1 / 255) if processor.get("do_rescale", 1) else 1
    scale = 255 * factor
    size, crop = processor.get("size") or {}, processor.get("crop_size") or {}
    edge = size if isinstance(size, int) else size.get("shortest_edge") or size.get("height")
    cut = crop if isinstance(crop, int) else crop.get("height")
    square = isinstance(size, int) or "height" in size
    resample = processor.get("resample", 2)  # a number that Pillow defines
    return {
        "mean": [value / scale for value in mean],
        "std": [value / scale for value in std],
        "interpolation": {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(resample),
        "crop_pct": cut / edge if processor.get("do_center_crop") and cut and edge else 1.0,
        "crop_mode": "squash" if square else "center",
    }


def from_google(arrays: dict[str, np.ndarray]) -> tuple[_State, ViTConfig, list[str]]:
    """Converts a ViT of github.com/google-research/vision_transformer (.npz).

    Returns: the weights with timm's names, their config, and the names that model.py does
        not use.
    Raises: UserError, for arrays with a different layout.
    """
    prefix = "opt/target/"  # of a checkpoint that also contains the optimizer's state
    if target := {n: array for n, array in arrays.items() if n.startswith(prefix)}:
        arrays = {name.removeprefix(prefix): array for name, array in target.items()}
    layout = "the layout of google-research/vision_transformer"
    try:
        tensors = {n: torch.from_numpy(np.asarray(a, np.float32)) for n, a in arrays.items()}
        state, num_heads = _google_names(tensors)
    except (KeyError, ValueError, TypeError, RuntimeError, IndexError) as error:
        some = ", ".join(sorted(arrays)[:3])
        raise UserError(f"the arrays ({some} ...) do not have {layout}: {error}") from error
    unused = sorted(name for name in tensors if name.startswith(("pre_logits/", "head/")))
    if unexpected := sorted(tensors.keys() - set(unused)):
        some = ", ".join(unexpected[:3])
        raise UserError(
            f"the arrays are not a plain ViT: {len(unexpected)} are unexpected, such as {some}"
        )
    return state, config_of(state, num_heads), unused


def _google_names(tensors: _State) -> tuple[_State, int]:
    """Pops a ViT's arrays from `tensors`; returns them with timm's names, and num_heads."""
    take = tensors.pop
    state = {
        "cls_token": take("cls"),
        "pos_embed": take("Transformer/posembed_input/pos_embedding"),
        "patch_embed.proj.weight": take("embedding/kernel").permute(3, 2, 0, 1),
        "patch_embed.proj.bias": take("embedding/bias"),
        "norm.weight": take("Transformer/encoder_norm/scale"),
        "norm.bias": take("Transformer/encoder_norm/bias"),
    }
    if "head/kernel" in tensors and "pre_logits/kernel" not in tensors:  # not in model.py
        state |= {"head.weight": take("head/kernel").T, "head.bias": take("head/bias")}
    depth = len({name.split("/")[1] for name in tensors if "/encoderblock_" in name})
    for layer in range(depth):
        theirs, ours = f"Transformer/encoderblock_{layer}/", f"blocks.{layer}."
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        # kernels: query, key, value (D, h, d); out (h, d, D)
        parts = [take(f"{attention}{part}/kernel") for part in ("query", "key", "value")]
        biases = [take(f"{attention}{part}/bias") for part in ("query", "key", "value")]
        num_heads = parts[0].shape[1]
        state |= {
            f"{ours}attn.qkv.weight": torch.cat([part.flatten(1).T for part in parts]),
            f"{ours}attn.qkv.bias": torch.cat([bias.flatten() for bias in biases]),
            f"{ours}attn.proj.weight": take(f"{attention}out/kernel").flatten(0, 1).T,
            f"{ours}attn.proj.bias": take(f"{attention}out/bias"),
        }
        for norm, number in (("norm1", 0), ("norm2", 2)):
            state[f"{ours}{norm}.weight"] = take(f"{theirs}LayerNorm_{number}/scale")
            state[f"{ours}{norm}.bias"] = take(f"{theirs}LayerNorm_{number}/bias")
        for number in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            state[f"{ours}mlp.fc{number + 1}.weight"] = take(f"{dense}kernel").T
            state[f"{ours}mlp.fc{number + 1}.bias"] = take(f"{dense}bias")
    if not depth:
        raise KeyError("Transformer/encoderblock_0")
    return state, num_heads


def config_of(state: _State, num_heads: int | None = None, norm_eps: float = 1e-6) -> ViTConfig:
    """The config of weights with timm's names, from their shapes.

    Args:
        state: the weights.
        num_heads: shapes do not reveal it; None: what ViT-Ti, S, B or L of this width has.
        norm_eps: shapes do not reveal it, either.

    Raises: UserError, for weights that are not a plain ViT.
    """
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        _, tokens, _ = state["pos_embed"].shape
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise UserError(
            f"the weights are not a plain ViT with timm's names: {error} is missing"
        ) from error
    except (ValueError, IndexError) as error:
        raise UserError(
            "the patch embedding, the position embeddings or the MLP have the wrong number of "
            "dimensions for a ViT"
        ) from error
    if num_heads is None and dim not in _HEADS:
        raise UserError(
            f"the number of heads is unknown for embedding dimension {dim}: name the file after "
            "its timm architecture, or put its config.json next to it and give the folder"
        )
    has_token = "cls_token" in state
    # The class token has a position embedding, or not (DeiT III); the others form a square.
    grids = {extra: round((tokens - extra) ** 0.5) for extra in range(has_token + 1)}
    squares = [extra for extra, grid in grids.items() if grid and grid**2 == tokens - extra]
    if not squares:
        raise UserError(
            f"{tokens} position embeddings are not a square grid, with or without a class token"
        )
    blocks = {int(m[1]) for name in state if (m := re.match(r"blocks\.(\d{1,4})\.", name))}
    if blocks != set(range(len(blocks))):
        raise UserError(f"its {len(blocks)} blocks are not numbered from 0 to {len(blocks) - 1}")
    head = state.get("head.weight")
    ratio = hidden / dim
    return ViTConfig(
        img_size=grids[squares[0]] * patch, patch_size=patch, in_chans=in_chans, embed_dim=dim,
        num_classes=0 if head is None else len(head), depth=len(blocks),
        num_heads=num_heads or _HEADS[dim],
        # Rounding can make dim * (hidden / dim) slightly less than hidden.
        mlp_ratio=ratio if int(dim * ratio) == hidden else math.nextafter(ratio, math.inf),
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        global_pool="avg" if "fc_norm.weight" in state or not has_token else "token",
        class_token=has_token, no_embed_class=has_token and squares[0] == 0, norm_eps=norm_eps,
    )  # fmt: skip


def is_vit(model: nn.Module) -> bool:
    """Whether a timm model is a ViT, plain or not: it has a sequence of blocks with attention."""
    blocks = getattr(model, "blocks", None)
    known = isinstance(model, timm_vit.VisionTransformer)
    return known or (bool(blocks) and hasattr(blocks[0], "attn"))


def unsupported_features(model: nn.Module) -> list[str]:
    """Features of a timm ViT that model.py does not implement; empty for a plain ViT."""
    block = model.blocks[0]
    attention, mlp = getattr(block, "attn", None), getattr(block, "mlp", None)
    patches, pool = getattr(model, "patch_embed", None), getattr(model, "global_pool", None)
    is_avg = pool == "avg"
    last_norm = getattr(model, "fc_norm" if is_avg else "norm", None)
    pools_late = is_avg and isinstance(getattr(model, "norm", None), nn.LayerNorm)

    def kind(module: nn.Module | None) -> str:
        return f"{type(module).__module__.split('.')[-1]}.{type(module).__name__}"

    def has_norm(module: nn.Module | None, name: str) -> bool:
        return not isinstance(getattr(module, name, None), nn.Identity | None)

    def not_square(*names: str) -> bool:
        return any(len(set(getattr(patches, name) or ())) > 1 for name in names)

    probe = torch.linspace(-4, 4, 65)
    found = {
        "rotary position embeddings": getattr(model, "rope", None) is not None,
        "no learned position embeddings": getattr(model, "pos_embed", None) is None,
        "register tokens": bool(getattr(model, "num_reg_tokens", 0)),
        "a distillation token": hasattr(model, "dist_token"),
        "attention pooling": getattr(model, "attn_pool", None) is not None,
        "a norm before the blocks (pre-norm)": has_norm(model, "norm_pre"),
        "relative position embeddings":
            hasattr(model, "rel_pos_bias") or hasattr(attention, "rel_pos"),
        "norms of queries and keys": has_norm(attention, "q_norm"),
        "norms inside attention and MLP": has_norm(attention, "norm") or has_norm(mlp, "norm"),
        f"an MLP of class {kind(mlp)}": type(mlp) not in (Mlp, type(None)),
        f"attention of class {kind(attention)}": type(attention) not in (Attention, type(None)),
        f"blocks of class {kind(block)}": type(block) is not timm_vit.Block,
        f"the activation {getattr(mlp, 'act', None)}":
            type(mlp) is Mlp and not torch.allclose(mlp.act(probe), F.gelu(probe), atol=1e-6),
        "a different patch embedding": type(patches) is not PatchEmbed or has_norm(patches, "norm"),
        "images or patches that are not square":
            type(patches) is PatchEmbed and not_square("grid_size", "patch_size"),
        "pooling after the final norm": pools_late,
        "no LayerNorm before the head": not pools_late and not isinstance(last_norm, nn.LayerNorm),
        "a mean that includes the class token":
            is_avg and getattr(model, "pool_include_prefix", False),
        f"the pooling {pool!r}": pool not in ("token", "avg"),
    }  # fmt: skip
    return [name for name, present in found.items() if present]
