"""The optimizers and their parameter groups, against timm and torch."""

import copy
import random

import pytest
import timm
import torch
from timm.models import group_parameters
from timm.optim import Muon as TimmMuon
from timm.optim import param_groups_layer_decay
from timm.optim.muon import zeropower_via_newtonschulz
from torch.utils._python_dispatch import TorchDispatchMode

from lab.core import UserError, machine
from lab.models.registry import classifier
from lab.training.optimizers import Muon, adamw, by_name, layers, muon, orthogonalize
from model import VisionTransformer, ViTConfig
from tests.finetuning.small import SWIN, timms_vit, vit


def rates(groups, model):
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(p)]: (round(group.get("lr_scale", 1.0), 9), group["weight_decay"])
        for group in groups
        for p in group["params"]
    }


@pytest.mark.parametrize("name", ["vit", "swin", "swinv2_cr_tiny_224", "convnext_atto", "resnet18"])
@pytest.mark.parametrize("decay", [0.65, 0.9])
def test_layer_decay_and_weight_decay_equal_timms(name, decay):
    if name == "vit":
        ours, theirs = vit(), timms_vit()
    else:
        arguments = SWIN if name == "swin" else {"num_classes": 10}
        name = "swin_tiny_patch4_window7_224" if name == "swin" else name
        with torch.device("meta"):  # only names and shapes matter
            ours = theirs = timm.create_model(name, **arguments)
    expected = param_groups_layer_decay(
        theirs, 0.05, no_weight_decay_list=theirs.no_weight_decay() if hasattr(
            theirs, "no_weight_decay") else (), layer_decay=decay,
    )  # fmt: skip
    groups = adamw(ours, 1e-3, 0.05, layer_decay=decay).param_groups
    assert rates(groups, ours) == rates(expected, theirs)


def test_head_has_its_own_learning_rate():
    model = vit()
    scales = rates(adamw(model, 1e-3, 0.05, layer_decay=0.5, head_lr_mult=10).param_groups, model)
    assert scales["head.weight"][0] == scales["head.bias"][0] == 10
    assert scales["blocks.2.mlp.fc1.weight"][0] == scales["norm.weight"][0] == 0.5
    assert scales["blocks.0.mlp.fc1.weight"][0] == 0.125
    assert scales["pos_embed"] == (0.0625, 0.0)


def test_last_layer_of_a_swin_is_its_head():
    with torch.device("meta"):
        model = timm.create_model("swin_tiny_patch4_window7_224", **SWIN)
    layer_of = layers(model)
    top = max(layer_of.values())
    assert {n for n, layer in layer_of.items() if layer == top} == {
        "head.fc.weight",
        "head.fc.bias",
    }
    assert classifier(model) is model.head.fc


@pytest.mark.parametrize(
    "name", ["test_vit", "test_resnet", "test_convnext", "test_efficientnet", "cait_xxs24_224"]
)
def test_layers_equal_timms(name):
    with torch.device("meta"):
        model = timm.create_model(name)
    expected = group_parameters(model, model.group_matcher(), reverse=True)
    assert layers(model) == {n: expected[n] for n, _ in model.named_parameters()}


# --- Muon ---

SETTINGS = {"use_fallback": True, "betas": (0.9, 0.999), "eps": 1e-8}


def test_unknown_optimizer_is_refused():
    with pytest.raises(UserError, match="OPTIMIZER='AdamW' is not one of adamw, muon"):
        by_name("AdamW")


def random_shapes(seed):
    """Several parameters each of a few random shapes: matrices and filters."""
    rng = random.Random(seed)
    shapes = [tuple(rng.randint(4, 40) for _ in range(2)) for _ in range(3)]
    shapes.append((rng.randint(4, 20), rng.randint(2, 6), 3, 3))
    several = [shape for shape in shapes for _ in range(rng.randint(1, 4))]
    return several + [(5, 4)] * 7  # more matrices than rows


def both_muons(seed):
    """Our Muon and timm's for equal parameters of random shapes, in fp32."""
    torch.manual_seed(seed)
    ours = [torch.nn.Parameter(torch.randn(shape)) for shape in random_shapes(seed)]
    ours += [torch.nn.Parameter(torch.randn(n)) for n in (3, 17)]  # for the fallback
    theirs = copy.deepcopy(ours)
    optimizers = []
    for params, kind, options in ((ours, Muon, {}), (theirs, TimmMuon, {
        "ns_coefficients": "original", "nesterov": True})):  # fmt: skip
        groups = [
            {"params": params[-2:], "weight_decay": 0.0, "nesterov": False, **SETTINGS},
            {"params": params[:-2], "weight_decay": 0.1},
        ]
        optimizers.append(kind(groups, lr=0.02, **options))
    return ours, theirs, *optimizers


def take_steps(ours, theirs, optimizers, steps=5):
    for _ in range(steps):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn_like(one)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()


@pytest.fixture
def fp32(monkeypatch):
    """Both Muons compute in fp32, timm's through the default of its `dtype`."""
    monkeypatch.setattr(machine, "bf16_is_faster", lambda device: False)
    defaults = list(zeropower_via_newtonschulz.__defaults__)
    defaults[defaults.index(torch.bfloat16)] = torch.float32
    monkeypatch.setattr(zeropower_via_newtonschulz, "__defaults__", tuple(defaults))


@pytest.mark.parametrize("seed", range(6))
def test_muon_equals_timms_matrix_by_matrix(seed, fp32):
    ours, theirs, *optimizers = both_muons(seed)
    take_steps(ours, theirs, optimizers)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=2e-6, rtol=0)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 40, 7), (5, 6, 33)])
def test_orthogonalized_matrices_equal_timms_and_are_nearly_orthogonal(shape):
    torch.manual_seed(0)
    matrices = torch.randn(shape)
    ours = orthogonalize(matrices)
    for one, matrix in zip(ours, matrices, strict=True):
        theirs = zeropower_via_newtonschulz(
            matrix, 5, [(3.4445, -4.7750, 2.0315)], dtype=torch.float32
        )
        torch.testing.assert_close(one, theirs, atol=2e-6, rtol=0)
    # Random square matrices have singular values near zero, which five iterations do not lift.
    if shape[1] != shape[2]:
        values = torch.linalg.svdvals(ours)
        assert values.min() > 0.6
        assert values.max() < 1.3


def test_states_of_muon_and_timms_muon_are_interchangeable(fp32):
    ours, theirs, *optimizers = both_muons(0)
    take_steps(ours, theirs, optimizers, steps=3)
    mine, timms = (copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers)
    optimizers[0].load_state_dict(timms)
    optimizers[1].load_state_dict({**timms, "state": mine["state"]})  # timm has more options
    take_steps(ours, theirs, optimizers, steps=3)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=4e-6, rtol=0)


def test_muon_skips_parameters_without_gradients(fp32):
    ours, theirs, optimizer, _ = both_muons(0)
    optimizer.step()
    assert all(one.equal(other) for one, other in zip(ours, theirs, strict=True))
    assert not optimizer.state


@pytest.mark.parametrize("make", [adamw, muon])
def test_adamw_has_the_usual_betas_also_beside_muon(make):
    """So comparing the two optimizers compares only the blocks' matrices."""
    model = VisionTransformer(
        ViTConfig(img_size=8, patch_size=4, embed_dim=8, depth=1, num_heads=2)
    )
    usual = torch.optim.AdamW([torch.zeros(1)]).defaults["betas"]
    found = [group["betas"] for group in make(model, 1e-3, 0.05).param_groups if "betas" in group]
    assert found == [usual, usual]


class CountLaunches(TorchDispatchMode):
    """Counts operators that compute something: on a GPU, each is at least one kernel launch."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "aten::" + function._schema.name.split("::")[-1] not in VIEWS
        return function(*args, **(kwargs or {}))


VIEWS = {f"aten::{name}" for name in (
    "view", "_unsafe_view", "transpose", "permute", "unbind", "detach", "expand", "alias", "empty",
    "empty_like", "t", "unsqueeze", "select", "reshape", "squeeze", "slice", "split",
)}  # fmt: skip


def test_launches_of_a_muon_step_do_not_depend_on_depth():
    counts = []
    for depth in (2, 6):
        sizes = {"img_size": 16, "patch_size": 4, "embed_dim": 32, "num_heads": 2}
        model = VisionTransformer(ViTConfig(num_classes=10, depth=depth, **sizes))
        optimizer = muon(model, 1e-3, 0.05)
        for _ in range(2):  # the first step creates the state
            for parameter in model.parameters():
                parameter.grad = torch.randn_like(parameter)
            with CountLaunches() as counter:
                optimizer.step()
        counts.append(counter.count)
    assert counts[0] == counts[1] < 130
