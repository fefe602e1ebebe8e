"""A run of a tiny ViT, and the hub on localhost as huggingface_hub's only hub."""

import json
import re
import runpy
import sys
from types import SimpleNamespace

import pytest
import torch

from lab.data import Preprocess
from lab.models.registry import save_model
from model import VisionTransformer, ViTConfig
from tests.models.reference import DIGITS, ROOT
from tests.shaken import shaken
from tests.sharing.hub_server import Hub

CONFIG = ViTConfig(
    img_size=8, patch_size=4, in_chans=1, num_classes=10, embed_dim=16, depth=1, num_heads=2
)


def save_run(folder, model, preprocess, classes=DIGITS, **constants):
    """A finished run of train.py on digits, as far as share.py reads it."""
    folder.mkdir(parents=True)
    save_model(folder / "best.safetensors", model, classes, preprocess,
               {"epoch": 1, "val_accuracy": 0.5})  # fmt: skip
    config = {
        "constants": {"DATASET": "digits", **constants}, "command": "python train.py",
        "commit": "c0ffee", "versions": {"torch": "2"}, "schema": 1,
        "hardware": {"cpu": "y", "cores": 2, "threads": 1},
        "dataset": {"name": "digits", "train": 4, "val": 2, "test": 3, "classes": classes},
    }  # fmt: skip
    metrics = {"test_accuracy": 0.75, "test_accuracy_95": [0.7, 0.8], "test_images": 4,
               "best_epoch": 1, "epochs": 1, "training_seconds": 1.0}  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "confusion.png").write_bytes(b"a figure")
    return folder


def run_code_of(card, images):
    """Runs the code in a model card. Returns: its variables, by the title above it."""
    found = {}
    for title, code in re.findall(r"With (.*?)[;:].*?```python\n(.*?)```", card, re.DOTALL):
        found[title] = {"images": images.numpy()}
        exec(code, found[title])
    return found


def logits_of(names, images):
    """What a model in these variables gives for the images."""
    if "session" in names:
        return torch.from_numpy(names["logits"])
    output = names["model"](images)
    return getattr(output, "logits", output)


@pytest.fixture
def vit_run(tmp_path):
    torch.manual_seed(0)
    model = shaken(VisionTransformer(CONFIG))
    return save_run(tmp_path / "runs" / "vit", model, Preprocess(8, [0.3], [0.4]))


@pytest.fixture
def script(tmp_path, monkeypatch, capsys):
    """Runs a script in this process; its results go to `tmp_path`/out."""
    monkeypatch.chdir(tmp_path)

    def run(name, *flags):
        argv = [str(ROOT / name), "--results-dir", "out", *map(str, flags)]
        monkeypatch.setattr(sys, "argv", argv)
        code = 0
        try:
            runpy.run_path(argv[0], run_name="__main__")
        except SystemExit as exit:
            code = exit.code
        out, err = capsys.readouterr()
        return SimpleNamespace(code=code, out=out, err=err)

    return run


@pytest.fixture
def hub(tmp_path, monkeypatch):
    hub = Hub()
    hub.be_the_only_one(monkeypatch, tmp_path)
    yield hub
    hub.stop()
