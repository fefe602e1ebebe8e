"""Snapshots: when they are taken, for which models, and what they contain."""

import itertools

import pytest
import torch

from lab.core import checkpoints
from lab.training.snapshots import resolve_count, save_snapshot, snapshot_epochs
from model import VisionTransformer, ViTConfig


@pytest.mark.parametrize("epochs", [1, 2, 5, 9, 30, 100, 300])
@pytest.mark.parametrize("count", [2, 3, 10])
def test_epochs_start_at_zero_and_end_at_the_last(epochs, count):
    chosen = snapshot_epochs(epochs, count)
    assert chosen[0] == 0
    assert chosen[-1] == epochs
    assert chosen == sorted(set(chosen))
    assert len(chosen) == min(count, epochs + 1)


def test_gaps_grow():
    chosen = snapshot_epochs(100, 10)
    gaps = [b - a for a, b in itertools.pairwise(chosen)]
    assert gaps == sorted(gaps)


@pytest.mark.parametrize(("count", "expected"), [(0, []), (1, [30])])
def test_few_snapshots(count, expected):
    assert snapshot_epochs(30, count) == expected


def test_default_is_ten_for_small_vits_only():
    small = ViTConfig(img_size=8, patch_size=4, embed_dim=32, depth=2, num_heads=2)
    large = ViTConfig(img_size=8, patch_size=4, embed_dim=256, depth=2, num_heads=2)
    with torch.device("meta"):
        assert resolve_count(None, VisionTransformer(small)) == 10
        assert resolve_count(None, VisionTransformer(large)) == 0
        assert resolve_count(None, torch.nn.Linear(2, 2)) == 0
        assert resolve_count(3, VisionTransformer(large)) == 3


def test_file_holds_fp16_weights_and_the_epoch(tmp_path):
    model = torch.nn.Linear(3, 2)
    save_snapshot(tmp_path, model, 7, 0.5)
    path = tmp_path / "snapshots" / "epoch-007.safetensors"
    weights, header = checkpoints.load_weights(path)
    assert header == {"epoch": 7, "val_accuracy": 0.5}
    assert torch.equal(weights["weight"], model.weight.half())
