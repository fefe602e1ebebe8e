"""The training loop and what it stands on, against torch, transformers, torchmetrics and numpy."""

import copy
import csv
import dataclasses
import json
import signal

import pytest
import timm
import torch
import torchmetrics
from safetensors import safe_open
from sklearn.metrics import log_loss
from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

from lab.core import UserError, checkpoints, machine, runtime
from lab.data.augment import Augmentation
from lab.data.loaders import Loaders, derive_seed
from lab.data.preprocess import Preprocess
from lab.models import load_model, profile_model
from lab.models.cnn import CNNConfig, ResidualCNN
from lab.models.registry import model_header
from lab.training import evaluation, loop, optimizers, results, trainer
from lab.training.config import FitConfig
from lab.training.optimizers import Schedule, adamw, layers, muon
from lab.training.progress import Progress
from lab.training.results import Predictions
from lab.training.state import EMA, TrainState
from model import VisionTransformer, ViTConfig
from tests.training.small import CONFIG, FP32, last_state, train


def sized(data, img_size):
    return Preprocess(img_size, data.mean, data.std)


@pytest.mark.parametrize("small_share", [0, 0.5])
def test_fit_equals_a_plain_torch_loop(data, tmp_path, small_share):
    """AdamW, warm-up and cosine, clipping, label smoothing, small images first, as written out."""
    how = dataclasses.replace(FP32, clip_grad=0.5, label_smoothing=0.1,
                              progressive_resize=small_share,
                              small_size=4)  # fmt: skip
    flexible = dataclasses.replace(CONFIG, dynamic_img_size=True)
    _, weights, _ = train(data, tmp_path, how, model_config=flexible)

    torch.manual_seed(0)
    model = timm.models.VisionTransformer(**{
        name: value for name, value in dataclasses.asdict(flexible).items() if name != "norm_eps"
    })  # fmt: skip
    torch.manual_seed(0)
    model.load_state_dict(VisionTransformer(flexible).state_dict())
    decayed = [p for n, p in model.named_parameters() if p.ndim > 1 and n not in NO_DECAY]
    others = [p for n, p in model.named_parameters() if p.ndim <= 1 or n in NO_DECAY]
    groups = [{"params": others, "weight_decay": 0.0}, {"params": decayed, "weight_decay": 0.05}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    steps = 2 * (1295 // 100)
    schedule = get_cosine_schedule_with_warmup(optimizer, int(0.2 * steps), steps)
    pixels, labels = data.train.images(slice(None)) / 255, data.train.labels
    pixels = (pixels - data.mean[0]) / data.std[0]
    for epoch in (1, 2):
        order = torch.randperm(1295, generator=torch.Generator().manual_seed(derive_seed(0, epoch)))
        for step in range(1295 // 100):
            rows = order[step * 100 : step * 100 + 100]
            # transformers' warm-up starts at 0, ours at 1 / warmup_steps: one step ahead.
            position = (epoch - 1) * (1295 // 100) + step
            if position < int(0.2 * steps):
                for group in optimizer.param_groups:
                    group["lr"] = 3e-3 * (position + 1) / int(0.2 * steps)
            size = [4, 4] if epoch == 1 and small_share else [8, 8]
            shown = torch.nn.functional.interpolate(pixels[rows], size, mode="area")
            loss = torch.nn.functional.cross_entropy(
                model(shown), labels[rows], label_smoothing=0.1
            )
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    for name, value in model.state_dict().items():
        if name.endswith("qkv.bias"):  # the keys' bias has no gradient, so Adam scales noise
            value, weights[name] = (v.reshape(3, -1)[[0, 2]] for v in (value, weights[name]))
        torch.testing.assert_close(weights[name], value, atol=2e-5, rtol=1e-3, msg=name)


NO_DECAY = ("cls_token", "pos_embed")


def test_accumulation_changes_nothing(data, tmp_path):
    """Up to rounding, and but for the keys' bias: its gradient is zero, so Adam scales noise."""
    _, whole, _ = train(data, tmp_path / "1")
    how = dataclasses.replace(FP32, accumulation_steps=3)
    _, parts, _ = train(data, tmp_path / "3", how)
    for name in whole:
        ours, theirs = parts[name], whole[name]
        if name.endswith("qkv.bias"):
            ours, theirs = (v.reshape(3, -1)[[0, 2]] for v in (ours, theirs))
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-3, msg=name)


def test_accumulated_gradients_have_the_size_of_the_whole_batch(data, tmp_path, monkeypatch):
    """AdamW alone would hide a wrong factor, but clipping does not."""
    seen: list[list[torch.Tensor]] = []
    step = optimizers.AdamW.step

    def recorded(optimizer, *_):
        seen.append([p.grad.clone() for g in optimizer.param_groups for p in g["params"]])
        return step(optimizer)

    monkeypatch.setattr(optimizers.AdamW, "step", recorded)
    train(data, tmp_path / "1", dataclasses.replace(FP32, epochs=1))
    count = len(seen)
    train(data, tmp_path / "3", dataclasses.replace(FP32, epochs=1, accumulation_steps=3))
    for whole, parts in zip(seen[0], seen[count], strict=True):
        torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_validation_is_plain_and_counts_every_image(data, tmp_path):
    """Neither the augmentation nor the dropout of training applies."""
    history, _, folder = train(
        data, tmp_path, augmentation=Augmentation(rotate=30, scale=0.3),
        model_config=dataclasses.replace(CONFIG, drop_rate=0.5),
    )  # fmt: skip
    best = max(history, key=lambda row: (row["val_accuracy"], row["epoch"]))
    model, _, classes = load_model(folder)
    assert classes == data.classes
    _, header = checkpoints.load_weights(folder / "best.safetensors")
    assert header["epoch"] == best["epoch"]
    images = (data.val.images(slice(None)) / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        probabilities = model(images).softmax(1).double()
    right = (probabilities.argmax(1) == data.val.labels).double().mean()
    assert best["val_accuracy"] == pytest.approx(right.item(), abs=1e-6)
    expected = log_loss(data.val.labels, probabilities / probabilities.sum(1, keepdim=True))
    assert best["val_loss"] == pytest.approx(expected, abs=1e-4)


def test_state_from_another_device_gets_the_layout_of_the_parameters():
    """On a GPU, filters are stored channels-last; fused steps read the state in memory order."""
    torch.manual_seed(0)
    layers = [torch.nn.Conv2d(3, 4, 2) for _ in range(2)]
    layers[1].load_state_dict(layers[0].state_dict())
    steppers = [optimizers.AdamW(layer.parameters(), lr=0.1, fused=True) for layer in layers]
    images = torch.randn(5, 3, 4, 4)
    for moved in (False, True):
        for layer, stepper in zip(layers, steppers, strict=True):
            layer.zero_grad()
            layer(images).square().sum().backward()
            if moved and stepper is steppers[1]:
                saved = stepper.state_dict()
                for state in saved["state"].values():
                    for name, value in state.items():
                        if value.ndim == 4:
                            state[name] = value.contiguous(memory_format=torch.channels_last)
                stepper.load_state_dict(saved)
                trainer._match_layouts(stepper)
            stepper.step()
    assert layers[0].weight.equal(layers[1].weight)


def test_a_copy_of_the_best_weights_shares_nothing_with_the_model():
    model = ResidualCNN(CNNConfig(in_chans=1, num_classes=3, dims=(4, 8, 16)))
    kept = trainer._copy_on_cpu(model)
    state, copied = model.state_dict(), kept.state_dict()
    assert all(copied[name].equal(value) for name, value in state.items())
    assert not {v.data_ptr() for v in state.values()} & {v.data_ptr() for v in copied.values()}
    assert type(kept) is ResidualCNN
    assert {type(p) for p in kept.parameters()} == {torch.nn.Parameter}


def test_the_last_of_equally_good_epochs_is_the_best():
    state = TrainState()
    rows = [{"epoch": i, "val_accuracy": value} for i, value in enumerate((0.5, 0.8, 0.8, 0.7), 1)]
    assert [state.finish_epoch(row) for row in rows] == [True, True, True, False]
    assert (state.best_epoch, state.epoch) == (3, 5)


def test_the_test_split_is_classified_by_the_best_epoch(data, tmp_path, monkeypatch):
    """Here the first of three epochs is the best, so its weights differ from the last ones."""
    finish = TrainState.finish_epoch
    monkeypatch.setattr(
        TrainState, "finish_epoch",
        lambda state, row: finish(state, {**row, "val_accuracy": 1 / row["epoch"]}),
    )  # fmt: skip
    _, last, folder = train(data, tmp_path, dataclasses.replace(FP32, epochs=3))
    weights, header = checkpoints.load_weights(folder / "best.safetensors")
    assert header["epoch"] == 1
    assert not weights["head.weight"].equal(last["head.weight"])
    model = VisionTransformer(CONFIG).eval()
    model.load_state_dict(weights)
    with torch.no_grad():
        logits = model((data.test.images(slice(None)) / 255 - data.mean[0]) / data.std[0])
    with open(folder / "predictions.csv", newline="") as file:
        confidence = [float(row["confidence"]) for row in csv.DictReader(file)]
    torch.testing.assert_close(
        torch.tensor(confidence), logits.softmax(1).amax(1), atol=1e-4, rtol=0
    )


def test_ctrl_c_during_the_test_of_a_run_stops_a_series(data, tmp_path, monkeypatch):
    def interrupt(model, loaders, split, accelerator):
        if split == "test":
            signal.raise_signal(signal.SIGINT)
        return evaluation.evaluate(model, loaders, split, accelerator)

    monkeypatch.setattr(loop, "evaluate", interrupt)
    with pytest.raises(runtime.Stopped, match="saved at the end of the run"):
        train(data, tmp_path)
    assert (tmp_path / "run" / "metrics.json").exists()


def test_every_epoch_trains_in_training_mode(data, tmp_path, monkeypatch):
    """Validation puts the model in evaluation mode, without dropout and stochastic depth."""
    modes, add = [], Progress.add

    def record(progress, *arguments):
        modes.append(progress._trainer.model.training)
        add(progress, *arguments)

    monkeypatch.setattr(Progress, "add", record)
    train(data, tmp_path, dataclasses.replace(FP32, epochs=2))
    assert modes == [True] * (2 * (len(data.train) // 100))


def test_moving_average_is_what_is_validated_and_kept(data, tmp_path, monkeypatch):
    how, steps, update = dataclasses.replace(FP32, epochs=1, ema_decay=0.9), [], EMA.update
    monkeypatch.setattr(EMA, "update", lambda *a: steps.append(a[2]) or update(*a))
    _, weights, folder = train(data, tmp_path, how)
    kept, _ = checkpoints.load_weights(folder / "best.safetensors")
    averaged = last_state(folder)["ema"]
    assert all(kept[name].equal(averaged[name]) for name in kept)
    assert not kept["head.weight"].equal(weights["head.weight"])
    assert steps == [*range(len(data.train) // 100)]  # after each step, counted from 0


@pytest.mark.parametrize("make", [
    lambda: FitConfig(1, lr_schedule="step"), lambda: FitConfig(1, precision="fp8"),
    lambda: Augmentation(auto_augment="randaug"),
])  # fmt: skip
def test_unknown_choices_are_refused_even_without_the_annotation_of_the_constant(make):
    with pytest.raises(UserError, match=r"[A-Z_]+: '\w+' is not one of"):
        make()


LONGER = dataclasses.replace(FP32, epochs=3)
TRAIN_ONE_EPOCH = loop.train_one_epoch


@pytest.mark.parametrize(("interval", "saves"), [(0, 3), (3600, 1)])
def test_state_is_saved_when_the_interval_has_passed_and_at_the_end(
    data, tmp_path, monkeypatch, interval, saves
):
    """Saving less often changes neither the state nor the weights that are kept."""
    _, weights, expected = train(data, tmp_path / "reference", LONGER)
    saved, save = [], checkpoints.save_state
    monkeypatch.setattr(trainer, "SAVE_INTERVAL", interval)
    monkeypatch.setattr(checkpoints, "save_state", lambda *a: saved.append(a) or save(*a))
    _, same, folder = train(data, tmp_path / "run", LONGER)
    assert len(saved) == saves
    assert all(weights[name].equal(same[name]) for name in weights)
    assert (folder / "best.safetensors").read_bytes() == (
        expected / "best.safetensors"
    ).read_bytes()


@pytest.mark.parametrize("best_epoch", [1, 2, 3])
def test_kept_weights_are_those_of_the_best_epoch_when_it_was_not_saved_at_once(
    data, tmp_path, monkeypatch, best_epoch
):
    states = []

    def scored(model, *_):
        states.append({name: value.clone() for name, value in model.state_dict().items()})
        logits = torch.nn.functional.one_hot(data.val.labels, 10) * 9.0
        if len(states) != best_epoch:
            logits = logits.roll(1, 0)
        return Predictions(logits, data.val.labels)

    monkeypatch.setattr(loop, "evaluate", scored)
    train(data, tmp_path, dataclasses.replace(LONGER, trial=True))
    kept, header = checkpoints.load_weights(tmp_path / "run" / "best.safetensors")
    assert all(kept[name].equal(states[best_epoch - 1][name]) for name in kept)
    assert header["epoch"] == best_epoch


def test_a_kill_loses_nothing_that_was_saved(data, tmp_path, monkeypatch):
    """The run dies in epoch 3; the state of epoch 1 and its best weights were saved together."""
    _, expected, whole = train(data, tmp_path / "whole", LONGER)
    clock = iter([0.0, 100.0, 100.0, 101.0])  # start; epoch 1 is due; saved; epoch 2 is not due
    monkeypatch.setattr(trainer.time, "monotonic", lambda: next(clock))

    def die_in_epoch_3(running):
        if running.state.epoch == 3:
            raise KeyError("killed")
        TRAIN_ONE_EPOCH(running)

    monkeypatch.setattr(loop, "train_one_epoch", die_in_epoch_3)
    with pytest.raises(KeyError, match="killed"):
        train(data, tmp_path / "killed", LONGER)
    monkeypatch.undo()
    folder = tmp_path / "killed" / "run"
    state = last_state(folder)["state"]
    assert state["epoch"] == 2
    assert checkpoints.load_weights(folder / "best.safetensors")[1]["epoch"] == 1
    assert len((folder / "history.csv").read_text().splitlines()) == 3  # header, epochs 1 and 2
    _, weights, folder = train(data, tmp_path / "killed", LONGER)
    assert all(weights[name].equal(expected[name]) for name in expected)
    for name in ("best.safetensors", "predictions.csv"):
        assert (folder / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize(("decay", "reference"), [
    ("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup),
])  # fmt: skip
def test_schedule_matches_transformers(decay, reference):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = reference(optimizer, 7, 50)
    ours = Schedule(50, 7, decay)
    for step in range(50):
        # Theirs spends its first step at rate 0; ours uses every step.
        expected = (step + 1) / 7 if step < 7 else optimizer.param_groups[0]["lr"]
        assert ours(step) == pytest.approx(expected)
        optimizer.step()
        theirs.step()


def test_groups_keep_their_share_of_the_rate():
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    optimizer = torch.optim.AdamW(
        [{"params": parameters[:1], "lr_scale": 0.1}, {"params": parameters[1:]}], lr=1e-2
    )
    schedule = Schedule(100, 10)
    for step in (0, 9, 50):
        schedule.set_lr(optimizer, step)
        low, high = (group["lr"] for group in optimizer.param_groups)
        assert low == pytest.approx(0.1 * high)
        assert high == pytest.approx(1e-2 * schedule(step))


def test_no_decay_on_norms_biases_tokens_positions():
    model = VisionTransformer(dataclasses.replace(CONFIG, init_values=0.1))
    groups = adamw(model, 1e-3, 0.05).param_groups
    decay = {id(p): group["weight_decay"] for group in groups for p in group["params"]}
    for name, parameter in model.named_parameters():
        matrix = name.endswith("weight") and "norm" not in name
        assert decay[id(parameter)] == (0.05 if matrix else 0), name


def test_muon_takes_the_steps_of_torchs_muon_and_adamw():
    """Muon for the matrices of the blocks; for all others the steps of torch's AdamW."""
    torch.manual_seed(0)
    ours = VisionTransformer(CONFIG)
    theirs = copy.deepcopy(ours)
    inner = {n for n, p in ours.named_parameters() if n.startswith("blocks") and p.ndim == 2}
    plain = {n for n, p in ours.named_parameters() if p.ndim == 1} | set(NO_DECAY)
    named = dict(theirs.named_parameters())
    others = [n for n in named if n not in inner]
    optimizers = [
        muon(ours, 3e-3, 0.05),
        torch.optim.Muon([named[n] for n in inner], 3e-3, 0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW([
            {"params": [named[n] for n in others if n in plain], "weight_decay": 0.0},
            {"params": [named[n] for n in others if n not in plain], "weight_decay": 0.05},
        ], 3e-3),
    ]  # fmt: skip
    before = copy.deepcopy(ours.state_dict())
    for _ in range(5):
        for name, parameter in ours.named_parameters():
            parameter.grad = torch.randn_like(parameter)
            named[name].grad = parameter.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for name, parameter in ours.named_parameters():
        assert not parameter.equal(before[name]), name
        # torch computes the orthogonal matrix in bf16, and so does ours if the hardware does.
        close = {"atol": 2e-4, "rtol": 0.02} if name in inner else {"atol": 1e-6, "rtol": 1e-5}
        torch.testing.assert_close(parameter, named[name], **close, msg=name)


@pytest.mark.parametrize("model", [
    VisionTransformer(CONFIG), ResidualCNN(CNNConfig()), timm.create_model("test_vit"),
], ids=["ViT", "CNN", "timm"])  # fmt: skip
def test_muon_leaves_the_first_layer_and_the_head_to_adamw(model):
    *fallback, inner = muon(model, 1e-3, 0.05).param_groups
    assert all(group["use_fallback"] for group in fallback)
    assert not inner["use_fallback"]
    groups = [p for group in (*fallback, inner) for p in group["params"]]
    assert {id(p) for p in groups} == {id(p) for p in model.parameters()}
    assert len(groups) == len(list(model.parameters()))
    names = {id(p): n for n, p in model.named_parameters()}
    of_matrices = {names[id(p)] for p in inner["params"]}
    ends = [n for n, p in model.named_parameters() if p.ndim > 1][-1]  # the head's weight
    stem = {n for n in names.values() if n.startswith(("patch_embed", "stem", "pos", "cls", "reg"))}
    assert not of_matrices & (stem | {ends})
    inside = [n for n, p in model.named_parameters() if n.startswith(("blocks", "layers"))
              and p.ndim > 1]  # fmt: skip
    assert of_matrices == set(inside)


@pytest.mark.parametrize("faster", [True, False])
def test_muon_computes_in_bf16_only_where_that_is_faster(faster, monkeypatch):
    monkeypatch.setattr(machine, "bf16_is_faster", lambda device: faster)
    dtypes = set()
    baddbmm = torch.baddbmm
    monkeypatch.setattr(torch, "baddbmm", lambda a, *args, **kwargs: (
        dtypes.add(a.dtype), baddbmm(a, *args, **kwargs))[1])  # fmt: skip
    model = VisionTransformer(CONFIG)
    optimizer = muon(model, 1e-3, 0.05)
    for parameter in model.parameters():
        parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    assert dtypes == {torch.bfloat16 if faster else torch.float32}


@pytest.mark.parametrize("optimizer", [adamw, muon])
def test_weight_decay_0_decays_nothing(optimizer):
    model = VisionTransformer(CONFIG)
    groups = optimizer(model, 1e-3, 0.0).param_groups
    assert {group["weight_decay"] for group in groups} == {0.0}
    assert sum(len(group["params"]) for group in groups) == len(list(model.parameters()))


@pytest.mark.parametrize("model", [
    VisionTransformer(dataclasses.replace(CONFIG, global_pool="avg", class_token=False)),
    timm.create_model("test_vit", global_pool="avg"),
], ids=["ours", "timm"])  # fmt: skip
def test_the_norm_after_pooling_belongs_to_the_last_block(model):
    layer_of = layers(model)
    head, fc_norm = layer_of["head.weight"], layer_of["fc_norm.weight"]
    last = f"blocks.{len(model.blocks) - 1}.norm1.weight"
    assert (layer_of["fc_norm.bias"], fc_norm, layer_of[last]) == (head - 1,) * 3
    groups = adamw(model, 1e-3, 0.05, head_lr_mult=10).param_groups
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert (scale[id(model.fc_norm.weight)], scale[id(model.head.weight)]) == (1, 10)


def test_ema_equals_timms():
    torch.manual_seed(0)
    model = ResidualCNN(CNNConfig())  # batch norm has buffers, one of them an integer
    ours, theirs = EMA(model, 0.9), timm.utils.ModelEmaV3(model, decay=0.9, use_warmup=True)
    for step in range(40):
        for value in model.state_dict().values():
            value.add_(torch.ones_like(value) if not value.is_floating_point()
                       else torch.randn_like(value))  # fmt: skip
        ours.update(model, step)
        theirs.update(model, step=step)
        for name, value in theirs.module.state_dict().items():
            assert ours.model.state_dict()[name].equal(value), (step, name)


def test_scores_match_torchmetrics():
    scores = Predictions(torch.randn(100, 7), torch.randint(7, (100,)))
    metric = torchmetrics.classification.MulticlassAccuracy(7, average="micro")
    assert scores.accuracy == pytest.approx(metric(scores.logits, scores.labels).item())


def test_costs_are_those_of_the_formula():
    """ViT: per block 12 D^2 N for the four linear maps and 2 N^2 D for the two products."""
    config = ViTConfig(
        img_size=32, patch_size=4, num_classes=10, embed_dim=48, depth=3, num_heads=3
    )
    facts = profile_model(VisionTransformer(config), (3, 32, 32))
    D, N, patches = 48, 65, 64
    macs = 3 * (12 * D * D * N + 2 * N * N * D) + patches * D * 3 * 4 * 4 + 10 * D
    assert facts["macs"] == macs
    assert facts["parameters"] == sum(p.numel() for p in VisionTransformer(config).parameters())
    # Backward costs twice the forward pass, but images need no gradient.
    assert facts["training_flops"] == 6 * macs - 2 * patches * D * 3 * 4 * 4

    flexible = VisionTransformer(dataclasses.replace(config, dynamic_img_size=True))
    small = results.profile_small_images(flexible, (3, 16, 16), 5)["small_images"]
    of_its_own = VisionTransformer(dataclasses.replace(config, img_size=16))
    expected = profile_model(of_its_own, (3, 16, 16))["training_flops"]
    assert small == {"epochs": 5, "img_size": 16, "training_flops": expected}


def test_loader_shows_each_image_once_an_epoch_and_the_same_for_the_same_seed(data):
    def labels_and_sums(loaders, epoch, first=0):
        return [(y.tolist(), x.sum().item()) for x, y in loaders.train(epoch, first)]

    one = Loaders(
        data, sized(data, 8), 64, Augmentation(crop_padding=1, rotate=10, scale=0.1), seed=3
    )
    two = Loaders(
        data, sized(data, 8), 64, Augmentation(crop_padding=1, rotate=10, scale=0.1), seed=3
    )
    assert labels_and_sums(one, 1) == labels_and_sums(two, 1)
    assert labels_and_sums(one, 1)[5:] == labels_and_sums(two, 1, first=5)
    assert labels_and_sums(one, 1) != labels_and_sums(one, 2)
    plain = Loaders(data, sized(data, 8), 1295, Augmentation(), seed=3)
    ((x, y),) = plain.train(1)
    expected = (data.train.images(slice(None)) / 255 - data.mean[0]) / data.std[0]
    assert y.sort().values.equal(data.train.labels.sort().values)
    distances = (x.flatten(1)[:, None] - expected.flatten(1)[None]).abs().amax(2)
    rows = distances.min(1)
    assert rows.values.max() < 1e-5
    assert y.equal(data.train.labels[rows.indices])


@pytest.mark.parametrize("world", [2, 5])
def test_processes_share_one_global_batch_and_evaluate_each_image_once(data, world):
    def part(rank, size):
        loaders = Loaders(
            data,
            sized(data, 8),
            60,
            Augmentation(crop_padding=1, random_erasing=0.5, rotate=5),
            seed=1,
        )
        loaders.to(torch.device("cpu"), rank, size)
        return loaders

    whole = list(part(0, 1).train(1))
    shares = [list(part(rank, world).train(1)) for rank in range(world)]
    for step, (images, labels) in enumerate(whole):
        assert torch.cat([share[step][1] for share in shares]).equal(labels)
        ours = torch.cat([share[step][0] for share in shares])
        torch.testing.assert_close(ours, images, atol=1e-5, rtol=0)
    seen = torch.cat([index for rank in range(world) for index, _, _ in
                      part(rank, world).evaluation("test")])  # fmt: skip
    assert seen.sort().values.equal(torch.arange(359))


def test_a_checkpoint_rebuilds_its_model(data, tmp_path):
    model = VisionTransformer(CONFIG).eval()
    path = tmp_path / "best.safetensors"
    header = model_header(model, data.classes, sized(data, 8))
    checkpoints.save_weights(path, model.state_dict(), header)
    rebuilt, preprocess, classes = load_model(path)
    images = torch.randn(2, 1, 8, 8)
    assert rebuilt(images).equal(model(images))
    assert classes == data.classes
    assert preprocess == sized(data, 8)
    with safe_open(path, "pt") as file:
        assert json.loads(file.metadata()["vit-lab"])["config"]["embed_dim"] == 16
    assert [p.name for p in tmp_path.iterdir()] == ["best.safetensors"]


def test_a_checkpoint_of_another_architecture_is_refused_by_key(data, tmp_path):
    path = tmp_path / "best.safetensors"
    state = VisionTransformer(dataclasses.replace(CONFIG, depth=1)).state_dict()
    header = model_header(VisionTransformer(CONFIG), data.classes, sized(data, 8))
    checkpoints.save_weights(path, state, header)
    with pytest.raises(UserError, match=r"\(12 mismatched keys\):\n  missing blocks.1"):
        load_model(path)
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(UserError, match="not a complete safetensors file"):
        load_model(path)
    with pytest.raises(UserError, match="there is no such file"):
        load_model(tmp_path / "none.safetensors")
