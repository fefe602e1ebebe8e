"""Mistakes in an edited model.py are found before training, and named by line where possible."""

from dataclasses import dataclass, fields

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lab.core import UserError
from lab.models.own_model import check_model, explain_errors
from model import VisionTransformer, ViTConfig

CONFIG = ViTConfig(img_size=8, patch_size=4, in_chans=1, num_classes=5, embed_dim=8, depth=2,
                   num_heads=2)  # fmt: skip


class Unregistered(VisionTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.more = [nn.Linear(8, 8)]


class Named(VisionTransformer):
    def __init__(self, config):
        super().__init__(config)
        self.more = {"extra": nn.Linear(8, 8)}


class AlwaysDropout(VisionTransformer):
    def forward(self, x):
        return F.dropout(super().forward(x), 0.5)


class NewLayerInForward(VisionTransformer):
    def forward(self, x):
        return nn.Linear(5, 5)(super().forward(x))


class Tuple(VisionTransformer):
    def forward(self, x):
        return super().forward(x), None


class NotPooled(VisionTransformer):
    def forward(self, x):
        return self.head(self.forward_features(x))


class TupleInTraining(VisionTransformer):
    def forward(self, x):
        return (super().forward(x),) if self.training else super().forward(x)


class Detached(VisionTransformer):
    def forward(self, x):
        return super().forward(x).detach()


class InfiniteGradient(VisionTransformer):
    def forward(self, x):
        logits = super().forward(x)
        return logits + (0 * logits).sqrt()


class NaN(VisionTransformer):
    def forward(self, x):
        return super().forward(x) / 0 * 0


class Renamed(nn.Module):
    config = CONFIG

    def forward_head(self, x):
        return x


@dataclass(frozen=True)
class ClassInConfig(ViTConfig):
    act: type = nn.ReLU


MISTAKES = {
    Unregistered: "Unregistered.more is a Python list, so its layers are not trained",
    Named: "Named.more is a Python dict, so its layers are not trained",
    Detached: "the gradient cannot be computed: element 0 of tensors does not require grad",
    InfiniteGradient: "NaN or infinite logits or gradients before any training",
    TupleInTraining: r"must return logits of shape \(2, 5\) .* returned a value of type tuple",
    Tuple: r"must return logits of shape \(2, 5\) .* returned a value of type tuple",
    NotPooled: r"must return logits of shape \(2, 5\) .* returned shape \(2, 5, 5\)",
    NaN: "NaN or infinite logits or gradients before any training",
}


@pytest.mark.parametrize("model", MISTAKES, ids=lambda model: model.__name__)
def test_a_mistake_is_found_before_training(model):
    with pytest.raises(UserError, match=MISTAKES[model]):
        check_model(model(CONFIG), (1, 8, 8), 5)


def test_a_missing_method_is_named():
    with pytest.raises(UserError, match="Renamed lacks group_matcher, which the lab needs"):
        check_model(Renamed(), (1, 8, 8), 5)


def test_a_config_that_cannot_be_saved_is_named():
    values = {field.name: getattr(CONFIG, field.name) for field in fields(CONFIG)}
    with pytest.raises(UserError, match=r"ViTConfig.act is .*ReLU.*cannot be saved"):
        check_model(VisionTransformer(ClassInConfig(**values)), (1, 8, 8), 5)


@pytest.mark.parametrize("model", [AlwaysDropout, NewLayerInForward])
def test_random_predictions_are_a_note(model, capsys):
    check_model(model(CONFIG), (1, 8, 8), 5)
    assert "different logits for the same image in evaluation mode" in capsys.readouterr().out


def test_frozen_layers_may_be_hidden_from_the_parameters():
    model = VisionTransformer(CONFIG)
    model.teacher = [nn.Linear(8, 8).requires_grad_(False)]
    check_model(model, (1, 8, 8), 5)
    model._hidden = [nn.Linear(8, 8)]
    with pytest.raises(UserError, match="_hidden is a Python list"):
        check_model(model, (1, 8, 8), 5)


def test_a_layer_without_effect_is_only_a_note(capsys):
    model = VisionTransformer(CONFIG)
    model.extra = nn.Linear(8, 8)
    model.list_of_registered_blocks = list(model.blocks)
    check_model(model, (1, 8, 8), 5)
    printed = capsys.readouterr().out
    assert printed == "note: no effect on the logits of model.py: extra.weight, extra.bias\n"


def test_a_correct_model_passes_and_is_left_as_it_was(capsys):
    torch.manual_seed(0)
    model = VisionTransformer(CONFIG)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    check_model(model, (1, 8, 8), 5)
    assert capsys.readouterr().out == ""
    assert model.training
    assert torch.get_rng_state().equal(state)
    assert all(value.equal(before[name]) for name, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())


def test_an_error_names_the_line_of_model_py():
    with (
        pytest.raises(UserError, match=r"^model.py, line \d+: ValueError: expected images"),
        explain_errors(),
    ):
        VisionTransformer(CONFIG)(torch.zeros(1, 1, 9, 9))
    with pytest.raises(ZeroDivisionError), explain_errors():
        _ = 1 / 0
