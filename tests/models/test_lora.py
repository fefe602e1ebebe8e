"""LoRA: the start, the product that it adds, and merging."""

import pytest
import timm
import torch
from torch import nn

from lab.core import UserError
from lab.data import load_data
from lab.models import load_model
from lab.models.lora import add_lora, merge, merged_state
from lab.training import fit
from lab.training.optimizers import adamw
from lab.training.state import TrainState
from model import VisionTransformer
from tests.finetuning.small import FP32, gray_loaders, open_run, vit


@pytest.fixture(scope="module")
def data():
    return load_data("digits")


def test_lora_starts_as_the_model_and_adds_b_times_a(data, tmp_path, monkeypatch):
    finish = TrainState.finish_epoch
    model = vit()
    images = torch.randn(3, 3, 8, 8)
    before, whole = model.state_dict(), model(images)
    before = {name: value.clone() for name, value in before.items()}
    add_lora(model, rank=2)
    model.head.requires_grad_(True)
    torch.testing.assert_close(model(images), whole, atol=1e-6, rtol=0)
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert count == 3 * 2 * ((32 + 96) + (32 + 32)) + 330
    loaders = gray_loaders(data)
    run = open_run(tmp_path, model, data)
    monkeypatch.setattr(TrainState, "finish_epoch", lambda state, row: finish(state, row) or True)
    fit(model, adamw(model, 1e-2, 0.0), loaders, FP32, run)  # the last epoch counts as the best
    saved = torch.load(run.folder / "last.pt", weights_only=True)["model"]
    kept, _, _ = load_model(run.folder)  # a plain ViT again
    assert type(kept) is VisionTransformer
    state = kept.state_dict()
    for name, value in state.items():
        if ".attn." in name and name.endswith("weight"):
            part = name.removesuffix("weight") + "parametrizations.weight.0."
            added = saved[part + "B"].numpy() @ saved[part + "A"].numpy() / 2**0.5
            expected = before[name].numpy() + added
            assert abs(added).max() > 1e-3
            torch.testing.assert_close(value, torch.from_numpy(expected), atol=1e-6, rtol=1e-5)
        elif not name.startswith("head"):
            assert value.equal(before[name]), name


def test_merging_does_not_change_the_output():
    model = vit()
    add_lora(model, rank=4)
    for name, parameter in model.named_parameters():
        if name.endswith(".B"):
            nn.init.normal_(parameter)
    images = torch.randn(2, 3, 8, 8)
    expected, state = model(images), merged_state(model)
    merge(model)
    torch.testing.assert_close(model(images), expected, atol=1e-5, rtol=1e-5)
    assert model.state_dict().keys() == state.keys() == vit().state_dict().keys()
    assert all(state[name].equal(value) for name, value in model.state_dict().items())


def test_lora_without_attention_layers_is_refused():
    with pytest.raises(UserError, match="no attention layers"):
        add_lora(timm.create_model("resnet18"), 4)
    with pytest.raises(UserError, match="LORA_RANK=33 must lie between 1 and 32"):
        add_lora(vit(), 33)
