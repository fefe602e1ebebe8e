"""Weights are found by name, file or folder; what cannot be used is refused with one sentence."""

import argparse
import json
import random
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file

from lab.core import UserError, runtime
from lab.data import Preprocess
from lab.models import load_pretrained, registry
from lab.models.sources import _architecture_in
from model import VisionTransformer, ViTConfig
from tests.models.reference import (
    SMALL,
    SMALL_SWIN,
    Code,
    assert_preprocess_of,
    assert_same_logits,
    exported,
    google,
    save_run,
    saved,
    timms,
)

# --- Names and files ---


@pytest.mark.parametrize(
    ("stem", "architecture"),
    [
        ("vit_base_patch16_224", "vit_base_patch16_224"),
        ("vit_base_patch16_224-b5f2ef4d", "vit_base_patch16_224"),
        ("vit_base_patch16_224.augreg_in21k", "vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224.augreg_in21k_mine", "vit_base_patch16_224.augreg_in21k"),
        (
            "vit_base_patch16_224.augreg2_in21k_ft_in1k",
            "vit_base_patch16_224.augreg2_in21k_ft_in1k",
        ),
        ("swin_base_patch4_window12_384_22kto1k", "swin_base_patch4_window12_384"),
        ("resnet500", None),
        ("test_vit9", None),
        ("model", None),
    ],
)
def test_architecture_is_read_from_the_file_name(stem, architecture):
    assert _architecture_in(stem) == architecture


def test_architecture_is_read_from_the_header(tmp_path):
    reference = timms("test_vit")
    path = tmp_path / "mine.safetensors"
    save_file(reference.state_dict(), path, metadata={"architecture": "test_vit"})
    assert_same_logits(load_pretrained(str(path)), reference, 160)
    save_file(reference.state_dict(), path, metadata={"architecture": "nobody_knows"})
    with pytest.raises(UserError, match="heads is unknown for embedding dimension 64"):
        load_pretrained(str(path))


def test_a_file_of_unknown_architecture_is_refused_with_advice(tmp_path):
    swin = timms("swin_tiny_patch4_window7_224", **SMALL_SWIN)
    with pytest.raises(UserError, match=r"is unknown: name the file after it.*config\.json"):
        load_pretrained(saved(swin, tmp_path / "mine.safetensors"))
    wide = timms("vit_tiny_patch16_224", embed_dim=1280, num_heads=16, depth=1)
    with pytest.raises(UserError, match="number of heads is unknown for embedding dimension 1280"):
        load_pretrained(saved(wide, tmp_path / "wide.safetensors"))


def test_number_of_heads_is_assumed_for_usual_widths(tmp_path):
    for name in ("vit_tiny_patch16_224", "vit_small_patch32_224"):
        reference = timms(name, depth=2)
        pretrained = load_pretrained(saved(reference, tmp_path / "mine.safetensors"))
        assert_same_logits(pretrained, reference, 224)
        heads = reference.blocks[0].attn.num_heads
        assert any(f"assuming {heads} heads" in remark for remark in pretrained.remarks)
        assert any("without mean and std" in remark for remark in pretrained.remarks)


def test_config_next_to_a_file_is_used(tmp_path):
    options = {**SMALL, "num_classes": 5}
    reference = timms("vit_tiny_patch16_224", **options)
    folder = Path(exported(reference, tmp_path / "vit", **options))
    pretrained = load_pretrained(str(folder / "model.safetensors"))
    assert_same_logits(pretrained, reference, 32)
    assert_preprocess_of(pretrained, reference, 32)


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("swin_tiny_patch4_window7", "swin_tiny_patch4_window7_224"),
        ("vit_base_patch16_224.augreg_in22k", "vit_base_patch16_224.augreg_in21k"),
        ("vit_base_patch16_224_in21k", "its name is now vit_base_patch16_224.augreg_in21k"),
        ("no/such/folder", "are not a file, a folder or a repository"),
        ("weights/none.safetensors", "no such file"),
        ("weights/vit_128x6_cifar10.safetensor", "mean weights/vit_128x6_cifar10.safetensors?"),
        ("./none", "no such file or folder"),
    ],
)
def test_wrong_names_are_answered_with_suggestions(source, said):
    with pytest.raises(UserError) as caught:
        load_pretrained(source)
    assert said in str(caught.value)
    assert source in str(caught.value)


def test_unknown_tag_lists_all_tags():
    tags = timm.list_pretrained("vit_base_patch16_224.*")
    assert len(tags) > 5
    with pytest.raises(UserError) as caught:
        load_pretrained("vit_base_patch16_224.mine")
    assert str(caught.value).endswith(", ".join(tags))


def test_weights_outside_the_hub_are_reported_with_their_address():
    cfg = timm.get_pretrained_cfg("gcvit_xxtiny.in1k")
    assert cfg.url
    assert not cfg.hf_hub_id
    with pytest.raises(UserError) as caught:
        load_pretrained("gcvit_xxtiny")
    assert f"download {cfg.url}" in str(caught.value)
    assert "weights/gcvit_xxtiny.in1k.pth" in str(caught.value)
    assert _architecture_in("gcvit_xxtiny.in1k") == "gcvit_xxtiny.in1k"  # so that advice is true


# --- Files of other programs ---


def nested(state, how):
    prefixed = {f"module.{k}": v for k, v in state.items()}
    return {
        "plain": state,
        "ordered": OrderedDict(state),
        "model": {"model": state, "epoch": 3, "args": argparse.Namespace(lr=0.1)},
        "module": {"state_dict": prefixed, "optimizer": {"state": [1, 2]}},
        "compiled": {"model": {f"_orig_mod.{k}": v for k, v in prefixed.items()}},
    }[how]


@pytest.mark.parametrize("how", ["plain", "ordered", "model", "module", "compiled"])
@pytest.mark.parametrize("suffix", [".pth", ".pt", ".pth.tar", ".bin"])
def test_pickles_of_training_scripts_load(how, suffix, tmp_path):
    reference = timms("test_vit", num_classes=7)
    path = tmp_path / f"test_vit{suffix}"
    torch.save(nested(reference.state_dict(), how), path)
    assert_same_logits(load_pretrained(str(path)), reference, 160)


def test_truncated_files_are_refused(tmp_path):
    vit, folder = timms("test_vit", depth=1), tmp_path / "whole"
    folder.mkdir()
    saved(vit, folder / "test_vit.safetensors")
    torch.save(vit.state_dict(), folder / "test_vit.pth")
    torch.save(vit.state_dict(), folder / "test_vit.pt", _use_new_zipfile_serialization=False)
    np.savez(folder / "vit.npz", **google(0)[0])
    np.savez_compressed(folder / "small.npz", **google(0)[0])
    rng = random.Random(0)
    for whole in folder.iterdir():
        content, path = whole.read_bytes(), tmp_path / whole.name
        for length in [0, 1, 8, 100, len(content) - 1, *rng.choices(range(len(content)), k=8)]:
            path.write_bytes(content[:length])
            with pytest.raises(UserError) as caught:
                load_pretrained(str(path))
            assert str(path) in str(caught.value)
        path.write_bytes(rng.randbytes(1000))
        with pytest.raises(UserError, match=whole.stem):
            load_pretrained(str(path))


def test_files_without_weights_are_refused(tmp_path):
    others = {"a list": [1, 2], "epoch": {"epoch": 3}, "nested": {"net": {"w": torch.zeros(1)}}}
    for content in (*others.values(), torch.zeros(3)):
        path = tmp_path / "test_vit.pth"
        torch.save(content, path)
        with pytest.raises(UserError, match="contains no named tensors"):
            load_pretrained(str(path))
    (tmp_path / "notes.txt").write_text("not weights")
    with pytest.raises(UserError, match=r"notes\.txt is not a file of weights"):
        load_pretrained(str(tmp_path / "notes.txt"))
    np.savez(tmp_path / "object.npz", a=np.array([Code(tmp_path / "made")], dtype=object))
    with pytest.raises(UserError, match=r"object\.npz is not a complete \.npz file of arrays"):
        load_pretrained(str(tmp_path / "object.npz"))
    assert not (tmp_path / "made").exists()
    np.savez(tmp_path / "text.npz", a=np.array(["no", "weights"]))
    with pytest.raises(UserError, match="layout of google-research"):
        load_pretrained(str(tmp_path / "text.npz"))


def test_folders_without_weights_are_refused(tmp_path):
    (tmp_path / "history.csv").write_text("epoch\n")
    with pytest.raises(UserError, match=r"contains no weights \(it contains history.csv\)"):
        load_pretrained(str(tmp_path))
    config = tmp_path / "config.json"
    for text, said in (
        ('{"model_type": "vit"}', "neither model.safetensors"),
        ('{"archit', "not a complete JSON"),
        ("{}", "config.json"),
    ):
        config.write_text(text)
        with pytest.raises(UserError, match=said):
            load_pretrained(str(tmp_path))
    saved(timms("test_vit"), tmp_path / "model.safetensors")
    config.write_text('{"architecture": "vit_nobody_knows"}')
    with pytest.raises(UserError, match="timm has no model 'vit_nobody_knows'"):
        load_pretrained(str(tmp_path))
    config.write_text('{"architecture": "test_vit", "model_args": {"num_heads": 7}}')
    with pytest.raises(UserError, match="cannot build test_vit"):
        load_pretrained(str(tmp_path))


def test_a_run_that_has_saved_no_weights_is_named(tmp_path):
    (tmp_path / "config.json").write_text('{"constants": {"EPOCHS": 3}}')
    with pytest.raises(UserError, match="has no weights yet: it was stopped before"):
        load_pretrained(str(tmp_path))


def test_the_resume_state_of_a_run_is_not_loaded_as_its_weights(tmp_path):
    model = VisionTransformer(ViTConfig(32, 8, embed_dim=192, depth=1))
    torch.save({"model": model.state_dict(), "optimizer": {}}, tmp_path / "last.pt")
    load_pretrained(str(tmp_path / "last.pt"))  # no run
    (tmp_path / "config.json").write_text('{"constants": {"EPOCHS": 3}}')
    with pytest.raises(UserError, match=f"use the folder of its run, {tmp_path}$"):
        load_pretrained(str(tmp_path / "last.pt"))


@pytest.mark.parametrize(("code", "remarks"), [("0123", 1), (None, 0)])
def test_a_run_of_another_model_py_gets_a_remark(code, remarks, tmp_path):
    """It may have the same parameters and compute something else."""
    used = runtime.source_hash(Path(sys.modules["model"].__file__).read_bytes())
    model = VisionTransformer(ViTConfig(**SMALL, num_classes=2))
    folder = save_run(tmp_path / "run", model, ["a", "b"], Preprocess(32, [0.5] * 3, [0.5] * 3))
    record = {"constants": {"MODEL_FILE": None}, "code": {"model.py": code or used}}
    (tmp_path / "run" / "config.json").write_text(json.dumps(record))
    found = load_pretrained(folder).remarks
    assert len(found) == remarks
    assert all("model.py has changed since" in remark for remark in found)


def test_an_infinite_mask_is_no_sign_of_divergence(tmp_path):
    class Masked(VisionTransformer):
        def __init__(self, config):
            super().__init__(config)
            self.register_buffer("mask", torch.full((3, 3), -torch.inf).triu(1))

    model = Masked(ViTConfig(**SMALL, num_classes=2))
    config, state = model.config, model.state_dict()
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(registry.OURS, "VisionTransformer", (Masked, ViTConfig))
        registry.build_and_load(config, state, "run")
        state["head.bias"][0] = torch.inf
        with pytest.raises(UserError, match="NaN or infinite values in 1 tensors"):
            registry.build_and_load(config, state, "run")


def test_positions_that_form_no_square_are_refused(tmp_path):
    state = timms("vit_tiny_patch16_224", depth=1).state_dict()
    state["pos_embed"] = torch.zeros(1, 14 * 15 + 1, 192)
    for name in ("mine", "vit_tiny_patch16_224"):
        save_file(state, tmp_path / f"{name}.safetensors")
        with pytest.raises(UserError, match="211 position embeddings"):
            load_pretrained(str(tmp_path / f"{name}.safetensors"))
