"""Weights of other libraries for model.py: their names, their shapes, and what it does not cover.

The field's names are timm's; transformers and Google's original JAX code have their own. What is
converted here gives the original's logits: tests/test_weights.py.
"""

import re
from typing import Any

import numpy as np
import torch
from timm.layers import Attention, Mlp, PatchEmbed
from timm.models import vision_transformer as timm_vit
from torch import Tensor, nn

from lab.errors import UserError
from model import ViTConfig

State = dict[str, Tensor]

TRANSFORMERS = {  # transformers' ViT, name by name, without the prefix "vit."
    "embeddings.cls_token": "cls_token",
    "embeddings.position_embeddings": "pos_embed",
    "embeddings.patch_embeddings.projection": "patch_embed.proj",
    "encoder.layer": "blocks",
    "layernorm_before": "norm1",
    "layernorm_after": "norm2",
    "attention.output.dense": "attn.proj",
    "intermediate.dense": "mlp.fc1",
    "output.dense": "mlp.fc2",
    "layernorm": "norm",
    "classifier": "head",
}


def from_transformers(state: State, config: dict[str, Any]) -> tuple[State, ViTConfig]:
    """A `ViTModel` or `ViTForImageClassification` and its config.json, in timm's names.

    Raises: UserError, for a model of transformers that is no plain ViT.
    """
    if config.get("model_type") != "vit" or config.get("hidden_act", "gelu") != "gelu":
        kind = f"{config.get('model_type')!r} with {config.get('hidden_act', 'gelu')!r}"
        raise UserError(
            f"this repository holds a model of transformers ({kind}); of its models only 'vit' "
            "with 'gelu' can be loaded. Most others are in timm, under a name of its own."
        )
    named: State = {}
    for name, value in state.items():
        name = name.removeprefix("vit.")
        for theirs, ours in TRANSFORMERS.items():
            name = name.replace(theirs, ours)
        named[name] = value
    for layer in range(config["num_hidden_layers"]):
        for kind in ("weight", "bias"):
            parts = [f"blocks.{layer}.attention.attention.{p}.{kind}" for p in
                     ("query", "key", "value")]  # fmt: skip
            if parts[0] in named:
                whole = torch.cat([named.pop(part) for part in parts])
                named[f"blocks.{layer}.attn.qkv.{kind}"] = whole
    eps = config.get("layer_norm_eps", 1e-12)
    return named, config_of(named, config["num_attention_heads"], eps)


def from_google(arrays: dict[str, np.ndarray]) -> tuple[State, ViTConfig]:
    """Google's `.npz` of a ViT (github.com/google-research/vision_transformer), in timm's names.

    Raises: UserError, for arrays of another layout.
    """
    arrays = {name.removeprefix("opt/target/"): array for name, array in arrays.items()}
    if "Transformer/posembed_input/pos_embedding" not in arrays:
        raise UserError(
            "these arrays have not the layout of google-research/vision_transformer (no "
            f"Transformer/posembed_input/pos_embedding, but {', '.join(sorted(arrays)[:3])} ...)"
        )
    tensors = {name: torch.from_numpy(np.asarray(a, np.float32)) for name, a in arrays.items()}
    state = {
        "pos_embed": tensors["Transformer/posembed_input/pos_embedding"],
        "patch_embed.proj.weight": tensors["embedding/kernel"].permute(3, 2, 0, 1),
        "patch_embed.proj.bias": tensors["embedding/bias"],
        "norm.weight": tensors["Transformer/encoder_norm/scale"],
        "norm.bias": tensors["Transformer/encoder_norm/bias"],
    }
    if "cls" in tensors:
        state["cls_token"] = tensors["cls"]
    if "head/kernel" in tensors and "pre_logits/kernel" not in tensors:  # that layer is not ours
        state |= {"head.weight": tensors["head/kernel"].T, "head.bias": tensors["head/bias"]}
    depth = len({name.split("/")[1] for name in tensors if "/encoderblock_" in name})
    for layer in range(depth):
        theirs, ours = f"Transformer/encoderblock_{layer}/", f"blocks.{layer}."
        attention = f"{theirs}MultiHeadDotProductAttention_1/"
        # kernels: query, key, value (D, h, d); out (h, d, D)
        parts = [tensors[f"{attention}{part}/kernel"] for part in ("query", "key", "value")]
        biases = [tensors[f"{attention}{part}/bias"] for part in ("query", "key", "value")]
        state |= {
            f"{ours}attn.qkv.weight": torch.cat([part.flatten(1).T for part in parts]),
            f"{ours}attn.qkv.bias": torch.cat([bias.flatten() for bias in biases]),
            f"{ours}attn.proj.weight": tensors[f"{attention}out/kernel"].flatten(0, 1).T,
            f"{ours}attn.proj.bias": tensors[f"{attention}out/bias"],
        }
        for norm, number in (("norm1", 0), ("norm2", 2)):
            state[f"{ours}{norm}.weight"] = tensors[f"{theirs}LayerNorm_{number}/scale"]
            state[f"{ours}{norm}.bias"] = tensors[f"{theirs}LayerNorm_{number}/bias"]
        for number in (0, 1):
            dense = f"{theirs}MlpBlock_3/Dense_{number}/"
            state[f"{ours}mlp.fc{number + 1}.weight"] = tensors[f"{dense}kernel"].T
            state[f"{ours}mlp.fc{number + 1}.bias"] = tensors[f"{dense}bias"]
    return state, config_of(state, num_heads=parts[0].shape[1])


def config_of(state: State, num_heads: int | None = None, norm_eps: float = 1e-6) -> ViTConfig:
    """The config that weights in timm's names have, by their shapes.

    num_heads: not to be seen in the weights; None takes heads of 64 channels, as all of the
        original ViTs have.
    Raises: UserError, for weights that are no plain ViT.
    """
    try:
        dim, in_chans, patch, _ = state["patch_embed.proj.weight"].shape
        tokens = state["pos_embed"].shape[1]
        hidden = state["blocks.0.mlp.fc1.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise UserError(f"these weights are no plain ViT in timm's names: no {error}") from error
    classed = "cls_token" in state
    grid = round((tokens - classed) ** 0.5)
    no_embed_class = classed and grid**2 != tokens - 1
    grid = round((tokens - (classed and not no_embed_class)) ** 0.5)
    if num_heads is None and dim % 64:
        raise UserError(
            f"the number of heads cannot be told from {dim} channels: name the file after its "
            "timm architecture, or put its config.json beside it and give the folder"
        )
    head = state.get("head.weight")
    return ViTConfig(
        img_size=grid * patch, patch_size=patch, in_chans=in_chans, embed_dim=dim,
        num_classes=0 if head is None else len(head),
        depth=1 + max(int(m[1]) for name in state if (m := re.match(r"blocks\.(\d+)\.", name))),
        num_heads=num_heads or dim // 64, mlp_ratio=hidden / dim,
        qkv_bias="blocks.0.attn.qkv.bias" in state,
        init_values=1e-5 if "blocks.0.ls1.gamma" in state else None,
        global_pool="avg" if "fc_norm.weight" in state or not classed else "token",
        class_token=classed, no_embed_class=no_embed_class, norm_eps=norm_eps,
    )  # fmt: skip


def is_vit(model: nn.Module) -> bool:
    """Whether a model of timm's is some ViT, plain or not: one grid of patches, equal blocks."""
    blocks = getattr(model, "blocks", None)
    return hasattr(model, "patch_embed") and bool(blocks) and hasattr(blocks[0], "attn")


def differences(model: nn.Module) -> list[str]:
    """What a ViT of timm's has that model.py has not, in words; empty for a plain ViT."""
    block = model.blocks[0]
    attention, mlp = block.attn, getattr(block, "mlp", None)
    fc_norm = getattr(model, "fc_norm", nn.Identity())
    averaged = getattr(model, "global_pool", "") == "avg"
    last = fc_norm if averaged else getattr(model, "norm", None)
    found = {
        "rotary positions": getattr(model, "rope", None) is not None,
        "no learned positions": getattr(model, "pos_embed", None) is None,
        "register tokens": bool(getattr(model, "num_reg_tokens", 0)),
        "a distillation token": hasattr(model, "dist_token"),
        "attention pooling": getattr(model, "attn_pool", None) is not None,
        "a norm before the blocks (pre-norm)":
            not isinstance(getattr(model, "norm_pre", nn.Identity()), nn.Identity),
        "relative positions": hasattr(model, "rel_pos_bias") or hasattr(attention, "rel_pos"),
        "norms of queries and keys":
            not isinstance(getattr(attention, "q_norm", nn.Identity()), nn.Identity),
        f"an MLP of the kind {type(mlp).__name__}": type(mlp) is not Mlp,
        f"attention of the kind {type(attention).__name__}": type(attention) is not Attention,
        f"blocks of the kind {type(block).__name__}": type(block) is not timm_vit.Block,
        f"the activation {getattr(mlp, 'act', None)}":
            type(mlp) is Mlp and getattr(mlp.act, "approximate", None) != "none",
        "patches cut in another way": type(model.patch_embed) is not PatchEmbed,
        "no LayerNorm in front of the head": not isinstance(last, nn.LayerNorm),
        f"pooling of the kind {getattr(model, 'global_pool', None)!r}":
            getattr(model, "global_pool", None) not in ("token", "avg"),
    }  # fmt: skip
    return [name for name, there in found.items() if there]
