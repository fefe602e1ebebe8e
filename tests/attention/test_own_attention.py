"""Attention that a student wrote: any layer names, with softmax or the fused kernel."""

import sys
import types
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.attention import attention_maps
from lab.attention.saliency import gradient_rollout, raw_attention, rollout
from lab.core import UserError
from tests.attention.zoo import close, images_for, ours

SOURCE = (Path(__file__).resolve().parents[2] / "model.py").read_text(encoding="utf-8")


class SeparateLayers(nn.Module):
    """Attention with three layers instead of `qkv`, and without `attn_drop` or `fused_attn`."""

    def __init__(self, attention):
        super().__init__()
        self.heads, dim = attention.num_heads, attention.proj.in_features
        self.query, self.key, self.value = (nn.Linear(dim, dim) for _ in range(3))
        for i, layer in enumerate((self.query, self.key, self.value)):
            layer.weight.data = attention.qkv.weight.data.chunk(3)[i]
            layer.bias.data = attention.qkv.bias.data.chunk(3)[i]
        self.out = attention.proj

    def split(self, x):
        return [layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
                for layer in (self.query, self.key, self.value)]  # fmt: skip

    def forward(self, x):
        return self.out(self.mix(*self.split(x)).transpose(1, 2).flatten(2))


class WrittenOut(SeparateLayers):
    def mix(self, q, k, v):
        return torch.softmax(q @ k.mT / q.shape[-1] ** 0.5, dim=-1) @ v


class WithEinsum(SeparateLayers):
    def mix(self, q, k, v):
        logits = torch.einsum("bhqd,bhkd->bhqk", q, k) * q.shape[-1] ** -0.5
        return torch.einsum("bhqk,bhkd->bhqd", nn.Softmax(dim=-1)(logits), v)


class Fused(SeparateLayers):
    def mix(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)


class HeadByHead(SeparateLayers):
    """One softmax per head: the weights have three dimensions."""

    def mix(self, q, k, v):
        heads = [F.softmax(q[:, i] @ k[:, i].mT / q.shape[-1] ** 0.5, -1) @ v[:, i]
                 for i in range(self.heads)]  # fmt: skip
        return torch.stack(heads, 1)


def with_attention(kind, **options):
    """Our model, and a copy with another implementation of attention."""
    torch.manual_seed(0)
    model = ours(**options)
    own = deepcopy(model)
    for block in own.blocks:
        block.attn = kind(block.attn)
    return model, own


@pytest.mark.parametrize("options", [{}, {"global_pool": "avg"}])
@pytest.mark.parametrize("kind", [WrittenOut, WithEinsum, Fused])
def test_own_attention_has_the_same_maps(kind, options):
    model, own = with_attention(kind, **options)
    images = images_for(model)
    close(own(images), model(images), atol=1e-5)
    for found, expected in zip(
        attention_maps(own, images)[1], attention_maps(model, images)[1], strict=True
    ):
        close(found.dense(), expected.dense())
    for found, expected in zip(
        raw_attention(own, images), raw_attention(model, images), strict=True
    ):
        close(found, expected)
    for method in (rollout, gradient_rollout):
        close(method(own, images), method(model, images))


@pytest.mark.parametrize("mask", ["none", "bool", "float", "causal"])
def test_masks_of_the_fused_kernel_are_respected(mask):
    N = 17
    lower = torch.ones(N, N, dtype=torch.bool).tril()
    bias = torch.randn(N, N)
    arguments = {"none": {}, "bool": {"attn_mask": lower}, "float": {"attn_mask": bias},
                 "causal": {"is_causal": True}}[mask]  # fmt: skip
    expected = {"none": torch.zeros(N, N), "float": bias}.get(mask)
    if expected is None:
        expected = torch.zeros(N, N).masked_fill(~lower, -torch.inf)

    class Masked(SeparateLayers):
        def mix(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, scale=0.3, **arguments)

    class Reference(SeparateLayers):
        def mix(self, q, k, v):
            return torch.softmax(q @ k.mT * 0.3 + expected, dim=-1) @ v

    masked, reference = (with_attention(kind)[1] for kind in (Masked, Reference))
    images = images_for(masked)
    close(masked(images), reference(images), atol=1e-5)
    logits, blocks = attention_maps(masked, images)
    close(logits, reference(images), atol=1e-5)
    for found, wanted in zip(blocks, attention_maps(reference, images)[1], strict=True):
        close(found.dense(), wanted.dense())
    for found, wanted in zip(
        raw_attention(masked, images), raw_attention(reference, images), strict=True
    ):
        close(found, wanted)


def test_attention_head_by_head_ends_in_a_message():
    _, own = with_attention(HeadByHead)
    with pytest.raises(UserError, match=r"0 of 3 blocks .* softmax on weights \(B, h, N, N\)"):
        attention_maps(own, images_for(own))


def test_renamed_classes_of_model_py_work(monkeypatch):
    source = SOURCE
    for name in ("Attention", "Block", "VisionTransformer"):
        source = source.replace(f"class {name}(", f"class My{name}(")
        source = source.replace(f" {name}(config", f" My{name}(config")
        source = source.replace(f"(*({name}(", f"(*(My{name}(").replace(f"({name}(", f"(My{name}(")
    module = types.ModuleType("renamed_model")
    monkeypatch.setitem(sys.modules, "renamed_model", module)  # dataclasses look it up
    exec(compile(source, "renamed_model", "exec"), module.__dict__)
    model = ours()
    own = module.MyVisionTransformer(module.ViTConfig(**vars(model.config))).eval()
    own.load_state_dict(model.state_dict())
    images = images_for(model)
    for found, expected in zip(
        raw_attention(own, images), raw_attention(model, images), strict=True
    ):
        assert torch.equal(found, expected)
