"""Weights of transformers and of Google's JAX code give the logits of their own library."""

import random

import numpy as np
import pytest
import timm
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file
from timm.models.vision_transformer import _load_weights
from torch import nn
from transformers import (
    CLIPImageProcessor,
    ViTForImageClassification,
    ViTForMaskedImageModeling,
    ViTImageProcessor,
    ViTModel,
)

from lab.core import UserError
from lab.data import Preprocess
from lab.models import load_pretrained
from model import VisionTransformer
from tests.models.reference import assert_same_logits, google
from tests.shaken import shaken

# --- transformers' names ---


def random_transformers(seed):
    """A config of a plain ViT, and its image processor."""
    rng = random.Random(seed)
    heads, patch = rng.choice([1, 2, 4]), rng.choice([4, 8])
    labels = rng.choice([1, 2, 5])
    named = {str(i): f"class {i}" for i in range(labels)} if rng.random() < 0.5 else None
    channels = rng.choice([1, 3])
    config = transformers.ViTConfig(
        hidden_size=heads * 16, num_attention_heads=heads, num_hidden_layers=rng.choice([1, 12]),
        intermediate_size=rng.choice([8, 50, 64]), layer_norm_eps=rng.choice([1e-12, 1e-6, 0.1]),
        qkv_bias=rng.random() < 0.5, patch_size=patch, image_size=patch * rng.choice([2, 3, 5]),
        num_channels=channels, **({"id2label": named} if named else {"num_labels": labels}),
    )  # fmt: skip
    processor = ViTImageProcessor(
        size={"height": config.image_size, "width": config.image_size},
        resample=rng.choice([2, 3]), do_normalize=rng.random() < 0.8,
        image_mean=[rng.uniform(0.2, 0.7) for _ in range(channels)],
        image_std=[rng.uniform(0.2, 0.5) for _ in range(channels)],
        rescale_factor=rng.choice([1 / 255, 1 / 127.5]),
    )  # fmt: skip
    return config, processor


class Logits(nn.Module):
    """A transformers model as a function of images only."""

    def __init__(self, model, of=lambda output: output.logits):
        super().__init__()
        self.model, self.of = model, of

    def forward(self, images):
        return self.of(self.model(images))


def normalized(images, preprocess):
    mean, std = (torch.tensor(v)[:, None, None] for v in (preprocess.mean, preprocess.std))
    return (images / 255 - mean) / std


@pytest.mark.parametrize("names", ["saved", "in memory"])
@pytest.mark.parametrize("seed", range(8))
def test_random_transformers_vits_give_the_same_logits(seed, names, tmp_path):
    config, processor = random_transformers(seed)
    reference = shaken(ViTForImageClassification(config), seed)
    reference.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    if names == "in memory":  # transformers 5 has other names there than in its files
        save_file(reference.state_dict(), tmp_path / "model.safetensors")
    pretrained = load_pretrained(str(tmp_path))
    size, channels = config.image_size, config.num_channels
    assert_same_logits(pretrained, Logits(reference), size, channels)

    pixels = torch.randint(0, 256, (channels, size, size), dtype=torch.uint8)
    found = pretrained.preprocess
    expected = processor(pixels, return_tensors="pt", input_data_format="channels_first")
    torch.testing.assert_close(
        normalized(pixels, found), expected["pixel_values"][0], atol=1e-4, rtol=1e-4
    )
    assert found.img_size == size
    assert found.interpolation == {2: "bilinear", 3: "bicubic"}[processor.resample]
    named = [config.id2label[i] for i in range(config.num_labels)]
    assert pretrained.classes == (None if named[0] == "LABEL_0" else named)


def test_center_crop_matches_transformers(tmp_path):
    config, _ = random_transformers(0)
    ViTForImageClassification(config).save_pretrained(tmp_path)
    processor = CLIPImageProcessor(
        size={"shortest_edge": config.image_size + 6}, crop_size=config.image_size, resample=3
    )
    processor.save_pretrained(tmp_path)
    size = config.image_size
    rng = np.random.default_rng(0)
    for file in ("preprocessor_config.json", "processor_config.json"):  # its name has changed
        if (tmp_path / file).exists():
            (tmp_path / file).rename(tmp_path / "preprocessor_config.json")
    found = load_pretrained(str(tmp_path)).preprocess
    assert found.resized == size + 6
    image = Image.fromarray(rng.integers(0, 256, (size + 6, size + 6, 3), dtype=np.uint8))
    expected = processor(image, return_tensors="pt")["pixel_values"][0]
    cut = torch.from_numpy(np.array(image)).permute(2, 0, 1)[:, 3:-3, 3:-3]
    three = Preprocess(size, processor.image_mean, processor.image_std)
    torch.testing.assert_close(normalized(cut, three), expected, atol=1e-4, rtol=1e-4)
    if config.num_channels == 3:
        assert (found.mean, found.std) == (
            list(processor.image_mean),
            list(processor.image_std),
        )


@pytest.mark.parametrize("kind", [ViTModel, ViTForMaskedImageModeling])
def test_unused_weights_are_left_out_and_named(kind, tmp_path):
    config = transformers.ViTConfig(
        hidden_size=32, num_attention_heads=4, num_hidden_layers=2, intermediate_size=48,
        image_size=16, patch_size=4, encoder_stride=4,
    )  # fmt: skip
    reference = shaken(kind(config))
    reference.save_pretrained(tmp_path)
    pretrained = load_pretrained(str(tmp_path))
    backbone = reference if kind is ViTModel else reference.vit
    tokens = Logits(backbone, lambda output: output.last_hidden_state[:, 0])
    assert pretrained.model.config.num_classes == 0
    assert_same_logits(pretrained, tokens, 16)
    dropped = ["pooler.dense.weight"] if kind is ViTModel else ["decoder.0.weight", "mask_token"]
    assert all(any(name in remark for remark in pretrained.remarks) for name in dropped)
    assert any("without mean and std" in remark for remark in pretrained.remarks)


def test_other_transformers_models_are_refused(tmp_path):
    config, _ = random_transformers(0)
    config.hidden_act = "quick_gelu"
    ViTForImageClassification(config).save_pretrained(tmp_path / "quick")
    with pytest.raises(UserError, match="quick_gelu"):
        load_pretrained(str(tmp_path / "quick"))
    transformers.DeiTModel(
        transformers.DeiTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1)
    ).save_pretrained(tmp_path / "deit")
    with pytest.raises(UserError, match="'deit'"):
        load_pretrained(str(tmp_path / "deit"))


# --- Google's names ---


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
@pytest.mark.parametrize("seed", range(6))
def test_google_arrays_give_the_logits_of_timms_loader(seed, prefix, tmp_path):
    arrays, options = google(seed)
    optimizer = {"opt/state/step": np.zeros(()), "accum_train_time": np.ones(())} if prefix else {}
    path = tmp_path / "vit.npz"
    np.savez(path, **{f"{prefix}{name}": array for name, array in arrays.items()}, **optimizer)
    reference = timm.models.VisionTransformer(**options).eval()
    _load_weights(reference, str(path))
    pretrained = load_pretrained(str(path))
    assert type(pretrained.model) is VisionTransformer
    assert_same_logits(pretrained, reference, options["img_size"])
    assert pretrained.preprocess.mean == pretrained.preprocess.std == [0.5] * 3


def test_google_arrays_without_a_place_are_named_or_refused(tmp_path):
    arrays, _ = google(0)
    path = tmp_path / "vit.npz"
    dim = len(arrays["embedding/bias"])
    layer = {"pre_logits/kernel": np.ones((dim, dim)), "pre_logits/bias": np.ones(dim)}
    np.savez(path, **arrays, **layer)
    pretrained = load_pretrained(str(path))
    assert pretrained.model.config.num_classes == 0
    for name in ("head/kernel", "head/bias", *layer):
        assert name in " ".join(pretrained.remarks)

    np.savez(path, **arrays, **{"conv_root/kernel": np.ones((7, 7, 3, 64))})  # R50 + ViT
    with pytest.raises(UserError, match="conv_root/kernel"):
        load_pretrained(str(path))
    for name in list(arrays):
        if name.startswith("head/"):
            continue
        np.savez(path, **{n: array for n, array in arrays.items() if n != name})
        with pytest.raises(UserError, match=r"layout|plain ViT"):
            load_pretrained(str(path))
