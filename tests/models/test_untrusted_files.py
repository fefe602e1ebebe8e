"""Malicious, damaged and mistyped files and names end with a UserError; no code in them runs."""

import json
import math
import os
import pickle
import struct

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from lab.core import UserError
from lab.data import Preprocess
from lab.models import load_pretrained
from lab.models.registry import TimmConfig, build_timm_model, model_header
from model import VisionTransformer, ViTConfig
from tests.models.reference import SMALL, Code, exported, saved, timms

CONFIG = ViTConfig(**SMALL, num_classes=3)
PREPROCESS = Preprocess(32, [0.5] * 3, [0.5] * 3)


@pytest.fixture
def vit():
    torch.manual_seed(0)
    return VisionTransformer(CONFIG)


@pytest.fixture
def header(vit):
    return {**model_header(vit, ["a", "b", "c"], PREPROCESS), "epoch": 1}


def refused(source, *words, load=load_pretrained):
    """The message of the UserError that loading raises, before it has built a huge model."""
    built, init = [], torch.nn.Linear.__init__
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Linear, "__init__", lambda *a, **k: built.append(0) or init(*a, **k))
        with pytest.raises(UserError) as caught:
            load(source)
    assert len(built) < 1000
    message = str(caught.value)
    for word in words:
        assert word in message
    return message


def write(path, state, header):
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(state, path, metadata={"vit-lab": text})
    return str(path)


@pytest.mark.parametrize("how", ["torch", "legacy", "pickle"])
def test_pickle_with_code_is_refused_and_does_not_run(how, tmp_path):
    path, made = tmp_path / "test_vit.pth", tmp_path / "made"
    content = {**timms("test_vit").state_dict(), "code": Code(made)}
    if how == "pickle":
        path.write_bytes(pickle.dumps({"code": Code(made)}))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=how == "torch")
    message = refused(str(path), "is refused", "as .safetensors")
    assert not made.exists()
    assert "mkdir" in message or how == "pickle"
    if how != "pickle":
        torch.load(path, weights_only=False)
        assert made.exists()  # it would have run


@pytest.mark.parametrize("name", [
    "checkpoint_path", "pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "cache_dir",
    "features_only", "block_fn",
])  # fmt: skip
def test_timm_arguments_other_than_shapes_are_refused(name, tmp_path):
    made, evil = tmp_path / "made", tmp_path / "evil.pth"
    torch.save({"state_dict": {"x": torch.zeros(1), "code": Code(made)}}, evil)
    arguments = {**SMALL, "num_classes": 3}
    folder = tmp_path / "folder"
    exported(timms("vit_tiny_patch16_224", **arguments), folder, **arguments)
    config = json.loads((folder / "config.json").read_text())
    config["model_args"][name] = str(evil)
    (folder / "config.json").write_text(json.dumps(config))
    refused(str(folder), f"'{name}' is refused")

    model = build_timm_model(TimmConfig("vit_tiny_patch16_224", arguments))
    header = model_header(model, ["a", "b", "c"], PREPROCESS)
    header["config"]["arguments"][name] = str(evil)
    path = write(tmp_path / "best.safetensors", model.state_dict(), header)
    refused(path, f"'{name}' is refused")
    with pytest.raises(UserError, match=f"'{name}' is refused"):
        TimmConfig.parse("vit_tiny_patch16_224", 32, f"{name}='x'")
    assert not made.exists()


@pytest.mark.parametrize(("name", "value"), [
    ("depth", 10**7), ("depth", "12"), ("depth", True), ("depth", -1), ("depth", [10**7]),
    ("embed_dim", 10**9), ("embed_dim", 32.0), ("img_size", 30_000), ("img_size", [30_000] * 2),
    ("mlp_ratio", 1e300), ("mlp_ratio", "4"), ("qkv_bias", 1), ("qkv_bias", "no"),
    ("num_heads", {}), ("global_pool", "a/b"), ("global_pool", 3), ("num_heads", [1] * 100),
])  # fmt: skip
def test_arguments_of_a_wrong_type_or_size_are_refused(name, value, vit, header, tmp_path):
    with pytest.raises(UserError, match=name):
        TimmConfig("vit_tiny_patch16_224", {name: value})
    header["config"][name] = value
    path = write(tmp_path / "best.safetensors", vit.state_dict(), header)
    refused(path, name)


def test_numbers_that_are_not_finite_are_refused():
    for value in (math.nan, math.inf):
        with pytest.raises(UserError, match="mlp_ratio"):
            TimmConfig("vit_tiny_patch16_224", {"mlp_ratio": value})


def test_config_larger_than_its_weights_is_refused_without_allocating_memory(vit, header, tmp_path):
    """A model of this config would need 600 GB."""
    header["config"] |= {"embed_dim": 16_000, "num_heads": 1000, "depth": 200}
    path = write(tmp_path / "best.safetensors", vit.state_dict(), header)
    refused(path, "does not match")
    arguments = {**SMALL, "num_classes": 3}
    folder = exported(timms("vit_tiny_patch16_224", **arguments), tmp_path / "hub", **arguments)
    config = json.loads((tmp_path / "hub" / "config.json").read_text())
    config["model_args"] |= {"embed_dim": 16_000, "num_heads": 1000, "depth": 100}
    (tmp_path / "hub" / "config.json").write_text(json.dumps(config))
    refused(folder, "does not match its config")


@pytest.mark.parametrize("text", ["{", "[]", "null", "3", '"text"', "[" * 100_000, "\x00", "{}",
                                  '{"model": "VisionTransformer"}'])  # fmt: skip
def test_damaged_headers_are_refused(text, vit, tmp_path):
    path = write(tmp_path / "best.safetensors", vit.state_dict(), text)
    refused(path, path)


@pytest.mark.parametrize(("entry", "value"), [
    ("model", None), ("model", []), ("model", "Linear"), ("model", "timm"), ("config", None),
    ("config", []), ("config", {"depth": 2, "windows": 3}), ("config", {"depth": None}),
    ("config", {"patch_size": 7}), ("classes", 3), ("classes", [1, 2]), ("preprocess", None),
    ("preprocess", [1]),
])  # fmt: skip
def test_mistyped_headers_are_refused(entry, value, vit, header, tmp_path):
    path = write(tmp_path / "best.safetensors", vit.state_dict(), {**header, entry: value})
    refused(path, path)


@pytest.mark.parametrize(("entry", "value"), [
    ("mean", "red"), ("mean", [None]), ("mean", 3), ("mean", {}), ("std", [0.0] * 3),
    ("std", [math.nan] * 3), ("std", ["a"] * 3), ("crop_pct", "all"), ("crop_pct", -1),
    ("crop_pct", []),
])  # fmt: skip
def test_mistyped_preprocessing_is_refused(entry, value, vit, header, tmp_path):
    header["preprocess"][entry] = value
    path = write(tmp_path / "best.safetensors", vit.state_dict(), header)
    if value == {}:  # the same as none
        load_pretrained(path)
    else:
        refused(path, path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x00" * 8,
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 4) + b"null",
    ],
)
def test_malformed_safetensors_files_are_refused(content, tmp_path):
    path = tmp_path / "best.safetensors"
    path.write_bytes(content)
    refused(str(path), "best.safetensors")


def test_weights_that_are_not_finite_are_refused(vit, header, tmp_path):
    for value in (math.nan, math.inf):
        state = vit.state_dict()
        state["blocks.1.mlp.fc1.bias"] = torch.full((128,), value)
        path = write(tmp_path / "best.safetensors", state, header)
        refused(path, "NaN or infinite", "blocks.1.mlp.fc1.bias")
        reference = timms("test_vit")
        reference.head.bias.data.fill_(value)
        refused(saved(reference, tmp_path / "test_vit.safetensors"), "NaN or infinite")


@pytest.mark.parametrize(
    "value",
    [
        None,
        torch.zeros(17),
        torch.zeros(17, 32),
        torch.zeros(1, 18, 32),
        torch.zeros(1, 17, 31),
        torch.zeros(0, 17, 32),
        torch.zeros(()),
    ],
)
def test_missing_or_misshapen_positions_are_refused(value, vit, header, tmp_path):
    state = {name: v for name, v in vit.state_dict().items() if name != "pos_embed"}
    if value is not None:
        state["pos_embed"] = value
    path = write(tmp_path / "best.safetensors", state, header)
    for size in (None, 64):
        refused(path, "pos_embed", load=lambda source, size=size: load_pretrained(source, size))
    reference = timms("test_vit")
    state = reference.state_dict()
    del state["pos_embed"]
    if value is not None:
        state["pos_embed"] = value
    for name in ("test_vit", "mine"):  # with a known architecture and without
        save_file(state, tmp_path / f"{name}.safetensors")
        refused(str(tmp_path / f"{name}.safetensors"))


def test_gaps_and_large_numbers_in_block_names_are_refused(tmp_path):
    state = timms("vit_tiny_patch16_224", depth=2).state_dict()
    for number in ("3", "99999", "9" * 5000):
        named = {k.replace("blocks.1.", f"blocks.{number}."): v for k, v in state.items()}
        save_file(named, tmp_path / "mine.safetensors")
        refused(str(tmp_path / "mine.safetensors"))


@pytest.mark.parametrize("text", [
    "[]", "null", "3", "{}", "[" * 100_000, '{"architecture": 5}', '{"architecture": null}',
    '{"architecture": ["test_vit"]}', '{"architecture": "test_vit", "model_args": [1]}',
    '{"architecture": "test_vit", "pretrained_cfg": [1]}',
    '{"architecture": "test_vit", "pretrained_cfg": "x"}',
    '{"architecture": "test_vit", "pretrained_cfg": {"mean": "red"}}',
    '{"architecture": "test_vit", "pretrained_cfg": {"std": [0, 0, 0]}}',
    '{"architecture": "test_vit", "pretrained_cfg": {"crop_pct": [1]}}',
    '{"model_type": "vit"}', '{"model_type": ["vit"]}', '{"model_type": null}',
    '{"model_type": "vit", "id2label": []}', '{"model_type": "vit", "id2label": {"a": "b"}}',
])  # fmt: skip
def test_mistyped_hub_configs_are_refused(text, tmp_path):
    saved(timms("test_vit"), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(text)
    refused(str(tmp_path), str(tmp_path))


def save_transformers(folder):
    """A tiny ViT as transformers saves it."""
    config = transformers.ViTConfig(
        hidden_size=16, num_attention_heads=1, num_hidden_layers=1, intermediate_size=8,
        image_size=8, patch_size=4,
    )  # fmt: skip
    transformers.ViTForImageClassification(config).save_pretrained(folder)


@pytest.mark.parametrize("field", ["num_attention_heads", "layer_norm_eps", "id2label"])
@pytest.mark.parametrize("value", ["12", [1], {"a": 1}, -1, 10**9])
def test_mistyped_transformers_configs_are_refused(field, value, tmp_path):
    save_transformers(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**content, field: value}))
    if (field, value) == ("layer_norm_eps", 10**9):
        load_pretrained(str(tmp_path))  # absurd but harmless
    else:
        refused(str(tmp_path), str(tmp_path))


@pytest.mark.parametrize("processor", [
    "[]", '{"image_mean": "red"}', '{"image_mean": [1, null, 2]}', '{"size": "big"}',
    '{"image_std": [0, 0, 0]}', '{"rescale_factor": 0}', '{"resample": [1]}',
    '{"do_center_crop": true, "crop_size": "x"}',
])  # fmt: skip
def test_mistyped_processors_are_refused(processor, tmp_path):
    save_transformers(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(processor)
    refused(str(tmp_path))


@pytest.mark.parametrize("source", [
    "..", "a/..", "../..", "a..b/c", "a--b/c", "me/--", "mé/modèle", "ViT-é", "x" * 300,
    f"{'a' * 150}/{'b' * 150}", "~nobody/x", "~", "a\0b", "a/b\0", "", " ", "/", "a/b/c", "-/-",
    "hf-hub:", "\n", "vit_tiny_patch16_224.", ".safetensors",
])  # fmt: skip
def test_strange_names_are_refused(source, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    refused(source)


def test_file_that_is_not_regular_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.safetensors")
    refused(str(tmp_path / "pipe.safetensors"), "no such file")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(str(tmp_path / "loop"), "no such file")


def test_message_for_own_weights_names_the_changed_model(vit, header, tmp_path):
    """As after a change of model.py: other parameters, or other fields in the config."""
    state = {name.replace("attn.qkv", "attn.query"): v for name, v in vit.state_dict().items()}
    path = write(tmp_path / "best.safetensors", state, header)
    refused(path, "changed model.py", "missing blocks.0.attn.qkv", "undo")
    header["config"]["num_registers"] = 4
    path = write(tmp_path / "best.safetensors", vit.state_dict(), header)
    refused(path, "changed model.py", "num_registers")


def test_undamaged_file_loads(vit, header, tmp_path):
    """What all the tests above change is fine without the change."""
    path = write(tmp_path / "best.safetensors", vit.state_dict(), header)
    model = load_pretrained(path).model
    state = load_file(path)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
