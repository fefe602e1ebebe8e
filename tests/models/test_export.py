"""Exported weights and their model cards say what the records say."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lab.core import Run, UserError
from lab.core.checkpoints import load_weights, save_weights
from lab.data import Preprocess
from lab.models import load_pretrained
from lab.models.registry import model_header
from lab.sharing import card
from model import VisionTransformer, ViTConfig
from tests.models.reference import SMALL

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def export():
    spec = importlib.util.spec_from_file_location("export", ROOT / "weights" / "export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run(tmp_path):
    """A finished run with a small ViT and the records of another one."""
    config = {
        "constants": {"EPOCHS": 2, "COMPILE": False}, "command": "python train.py", "commit": "c0",
        "model": {"class": "VisionTransformer", "parameters": 7}, "uncommitted_changes": False,
        "dataset": {"name": "x", "train": 1, "val": 2, "test": 3, "classes": ["a", "b", "c"]},
        "hardware": {"cpu": "y", "cores": 2, "threads": 1}, "versions": {}, "python": "3",
    }  # fmt: skip
    metrics = {"test_accuracy": 0.5, "test_accuracy_95": [0.4, 0.6], "training_seconds": 1.0,
               "best_epoch": 1, "epochs": 2, "test_images": 3}  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    model = VisionTransformer(ViTConfig(**SMALL, num_classes=3))
    header = model_header(model, ["a", "b", "c"], Preprocess(32, [0.5] * 3, [0.5] * 3))
    save_weights(tmp_path / "best.safetensors", model.state_dict(), header)
    return Run(tmp_path)


def test_exported_weights_are_the_run_in_half_precision(export, run, tmp_path, monkeypatch):
    target = tmp_path / "mine.safetensors"
    monkeypatch.setattr(sys, "argv", ["export.py", str(run.folder), str(target)])
    export.main()
    before, after = load_file(run.folder / "best.safetensors"), load_file(target)
    assert all(after[name].equal(value.half()) for name, value in before.items())
    assert load_pretrained(str(target)).classes == ["a", "b", "c"]
    text = target.with_suffix(".md").read_text()
    assert text.startswith("# mine\n\nVisionTransformer, 7 parameters")
    assert "| start | trained from scratch |" in text
    assert '`{"EPOCHS": 2}`' in text
    content = target.read_bytes()
    monkeypatch.setattr(export, "LIMIT_MB", 0.01)
    with pytest.raises(UserError, match=r"the limit is 0\.01 MB"):
        export.main()
    assert target.read_bytes() == content


def test_a_card_does_not_promise_to_reproduce_uncommitted_code(export, run):
    weights, config = run.folder / "best.safetensors", run.config()
    committed = export.describe(weights, card.Records.find(str(run.folder)))
    (run.folder / "config.json").write_text(json.dumps({**config, "uncommitted_changes": True}))
    changed = export.describe(weights, card.Records.find(str(run.folder)))
    assert "gives these weights at this commit" in committed
    assert "gives these weights at this commit" not in changed
    assert "had uncommitted changes" in changed


@pytest.mark.parametrize("mode", ["full", "head", "lora"])
def test_fine_tuned_run_is_not_called_trained_from_scratch(mode, export, run):
    config = run.config()
    config["constants"]["MODE"] = mode
    config["pretrained"] = {"origin": "vit_base", "weights": "c0ffee"}
    (run.folder / "config.json").write_text(json.dumps(config))
    text = export.describe(run.folder / "best.safetensors", card.Records.find(str(run.folder)))
    assert "| start | fine-tuned from `vit_base` |" in text
    assert f'"MODE": "{mode}"' in text
    assert "scratch" not in text


@pytest.mark.parametrize(("name", "folder"), [
    ("vit_128x6_cifar10", "results/official/train/cifar10-jpeg-vit_128x6-pretraining-muon"),
    ("swin_48x222_cifar10", "results/official/train/cifar10-jpeg-swin_48x222-pretraining-muon"),
    ("cnn_128x6_cifar10",
     "results/official/cnn_baseline/cifar10-jpeg-cnn_42-85-168-pretraining-muon"),
    ("vit_64x4_mnist5k", "theory/patch_size/mnist-5k-patch4-s0"),
    ("cnn_64x4_mnist5k", "theory/patch_size/mnist-5k-cnn-s0"),
])  # fmt: skip
def test_cards_of_the_bundled_weights_match_the_records(name, folder, export, monkeypatch):
    monkeypatch.chdir(ROOT)
    path = Path("weights") / f"{name}.safetensors"
    state, _ = load_weights(path)
    assert all(torch.isfinite(value).all() for value in state.values())
    text = path.with_suffix(".md").read_text(encoding="utf-8")
    assert text == export.describe(path, card.Records.find(folder))
