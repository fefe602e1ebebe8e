"""Normalization of images and features: the numbers in normalization.md.

python theory/normalization.py                     # prints the steps, and fails if the text differs
python theory/normalization.py --draw              # draws normalization.png too
"""

import json
import math
import sys
from contextlib import suppress

import torch
import torch.nn.functional as F
from _text import ROOT, check, claim
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor, nn

from lab.data import Preprocess, datasets, load_data
from lab.models import cnn as cnn_models
from lab.models import load_pretrained, registry
from model import VisionTransformer, ViTConfig

RUN = ROOT / "results" / "official" / "train" / "cifar10-jpeg-vit_128x6-pretraining-muon"
WEIGHTS = ROOT / "weights" / "vit_128x6_cifar10.safetensors"
SOURCES = {  # phrases that are definitions
    "integer from 0 to 255. Take a red of 200": "8-bit images",
    "**Scale to [0, 1]** by dividing by 255": "8-bit images",
    "The direction with the largest sum of squares limits the learning rate for all others (LeCun "
    "et al. 1998, section 4.3)": "LeCun et al. 1998, section 4.3",
    "by $n$ (the *biased* variance). BatchNorm's running variance uses $n - 1$": "definition",
    "For digits in [0, 1], the first principal direction": "the measurement",
    "A feature shift of 1.0 is": "definition",
    "only one value per channel (B = H = W = 1)": "definition",
}
TRAIN, TEST = 200, 100  # digits that a head is fitted on, and judged by


def row(values, digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def images_said() -> dict[str, str]:
    """The numbers of each dataset, and what one red value becomes."""
    record = json.loads((RUN / "config.json").read_text(encoding="utf-8"))["dataset"]
    mean, std = record["mean"], record["std"]
    digits = load_data("digits")
    assert datasets.channel_statistics(digits.train) == (digits.mean, digits.std)
    red = 200 / 255
    steps = {
        "scale to [0, 1]": ("200 / 255", 0, 1),
        "scale to [-1, 1]": (f"({red:.3f} - 0.5) / 0.5", 0.5, 0.5),
        "standardize with CIFAR-10's numbers":
            (f"({red:.3f} - {mean[0]:.3f}) / {std[0]:.3f}", mean[0], std[0]),
    }  # fmt: skip
    said = {}
    for name, (formula, center, scale) in steps.items():
        value, black, white = ((x - center) / scale for x in (red, 0, 1))
        digits_shown = 2 if "standardize" in name else 3
        said[name] = (
            f"| {name} | ${formula}$ | {value:.{digits_shown}f} | {black:.2f} to {white:.2f} |"
        )
    return said | {
        "CIFAR-10, JPEG copy": f"| {row(mean, 4)} | {row(std, 4)} | record of our run",
        "digits": f"| {row(digits.mean)} | {row(digits.std)} | computed here",
        "ImageNet": f"| {row(IMAGENET_DEFAULT_MEAN)} | {row(IMAGENET_DEFAULT_STD)} | timm's",
        "one half": f"| [-1, 1] | {row(IMAGENET_INCEPTION_MEAN, 1)} "
                    f"| {row(IMAGENET_INCEPTION_STD, 1)} |",
        **geometry_said(), **per_image_said(),
    }  # fmt: skip


def geometry_said() -> dict[str, str]:
    """Resizing and cropping, with the rounding of lab/data/preprocess.py."""
    size, crop_pct, width, height = 224, 0.875, 500, 375
    short = Preprocess.resized_size(size, crop_pct)
    wide = round(width * short / height)
    return {
        "usual size": f"usual recipe for {size} pixels",
        "resized": f"resizes the shorter side to {size} / {crop_pct} = {short} pixels",
        "a photo": f"photo of {width} x {height} pixels becomes {wide} x {short}, then "
                   f"{size} x {size}",
        "kept": f"keeps {100 * size**2 / (wide * short):.0f} % of the resized image",
    }  # fmt: skip


def per_image_said() -> dict[str, str]:
    """A digit and a darker copy: identical after per-image standardization only."""
    data = load_data("digits")
    bright = data.train.images(slice(0, 100)).double() / 255  # (B, 1, 8, 8)
    dark = bright / 2

    def per_image(x: Tensor) -> Tensor:
        axes = (1, 2, 3)
        return (x - x.mean(axes, keepdim=True)) / x.std(axes, keepdim=True, correction=0)

    assert (per_image(bright) - per_image(dark)).abs().max() < 1e-12
    by_dataset = [(x - data.mean[0]) / data.std[0] for x in (bright, dark)]
    gap = (by_dataset[0] - by_dataset[1]).square().mean().sqrt().item()
    assert gap > 0.1
    return {
        "per-image": "become identical (difference below 1e-12), while",
        "per dataset": f"differ by {gap:.2f} (root mean square)",
    }


def steps_to(share: float, x: Tensor, y: Tensor, rate: float) -> int:
    """Steps of gradient descent until a linear softmax model has `share` of its images right."""
    x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
    weight, target = x.new_zeros(x.shape[1], 10), F.one_hot(y, 10).double()
    for step in range(2000):
        logits = x @ weight
        if (logits.argmax(1) == y).double().mean() >= share:
            return step
        weight -= rate * x.T @ (logits.softmax(1) - target) / len(x)
    raise AssertionError("2,000 steps were not enough")


def training_said() -> dict[str, str]:
    """The same linear model on the same digits in two scales, each at a rate that suits it."""
    data = load_data("digits")
    y, unit = data.train.labels, data.train.images(slice(None)).double().flatten(1) / 255
    steps, shares = [], []
    for x in (unit, (unit - data.mean[0]) / data.std[0]):
        values = torch.linalg.eigvalsh(x.T @ x / len(x))
        steps.append(steps_to(0.95, x, y, rate=1 / values[-1].item()))
        shares.append(100 * (values[-1] / values.sum()).item())
    return {
        "one direction": f"carries {shares[0]:.0f} % of their sum of squares; after "
        f"normalization it is {shares[1]:.0f} %",
        "steps": claim(
            f"95 % of the training digits correctly after {steps[0]} steps without normalization "
            f"and after {steps[1]} with it",
            steps[1] < steps[0],
        ),
    }


@torch.no_grad()
def wrong_numbers() -> tuple[list[tuple[str, str, float, float]], float]:
    """What our pretrained ViT makes of digits, by mean and std of its input.

    Returns: name, what black and white become, how far features move, accuracy; and the accuracy
        with digits' own numbers if the head is fitted to them.
    """
    data, given = load_data("digits"), load_pretrained(str(WEIGHTS))
    right = given.preprocess
    scales = {
        "its own": (right.mean, right.std),
        "ImageNet": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        "0.5 and 0.5": ([0.5] * 3, [0.5] * 3),
        "those of digits": (data.mean * 3, data.std * 3),
        "none: [0, 1]": ([0.0] * 3, [1.0] * 3),
    }
    train, test = (right.center_crop(split.images(slice(0, count)))
                   for split, count in ((data.train, TRAIN), (data.test, TEST)))  # fmt: skip

    def features(images: Tensor, mean, std) -> Tensor:
        mean, std = (torch.tensor(list(v)).reshape(1, 3, 1, 1) for v in (mean, std))
        images = ((images - mean) / std).split(32)  # gray, (B, 1, S, S), becomes (B, 3, S, S)
        return torch.cat(
            [registry.pooled_features(given.model, part) for part in images]
        ).double()  # (B, D)

    def head(x: Tensor, y: Tensor):
        """Ridge regression on the labels: a linear head in closed form."""
        middle, target = x.mean(0), F.one_hot(y, 10).double()
        gram = (x - middle).T @ (x - middle) + torch.eye(x.shape[1]).double()
        weight = torch.linalg.solve(gram, (x - middle).T @ (target - target.mean(0)))
        return lambda z: ((z - middle) @ weight + target.mean(0)).argmax(1)

    labels, answers = data.train.labels[:TRAIN], data.test.labels[:TEST]
    fitted = head(features(train, *scales["its own"]), labels)
    found, seen = [], {}
    for name, (mean, std) in scales.items():
        z = seen[name] = features(test, mean, std)
        own = seen["its own"]
        moved = ((z - own).norm(dim=1) / (own - own.mean(0)).norm(dim=1)).mean().item()
        ends = f"{(0 - mean[0]) / std[0]:.1f} to {(1 - mean[0]) / std[0]:.1f}"
        found.append((name, ends, moved, (fitted(z) == answers).double().mean().item()))
    again = head(features(train, *scales["those of digits"]), labels)(seen["those of digits"])
    return found, (again == answers).double().mean().item()


def folded_gap() -> float:
    """What is lost if another mean and std are put into the first layer's weights: nothing."""
    torch.manual_seed(0)
    old_mean, old_std = (
        torch.tensor(v).double() for v in (IMAGENET_INCEPTION_MEAN, IMAGENET_INCEPTION_STD)
    )
    new_mean, new_std = (torch.tensor(v).double() for v in
                         (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))  # fmt: skip
    images, proj = torch.rand(2, 3, 32, 32).double(), nn.Conv2d(3, 24, 4, 4).double()
    other = nn.Conv2d(3, 24, 4, 4).double()

    def scaled(mean: Tensor, std: Tensor) -> Tensor:
        return (images - mean.reshape(3, 1, 1)) / std.reshape(3, 1, 1)

    with torch.no_grad():
        factor, shift = new_std / old_std, (new_mean - old_mean) / old_std
        other.weight.copy_(proj.weight * factor.reshape(1, 3, 1, 1))
        other.bias.copy_(proj.bias + (proj.weight.sum((2, 3)) * shift).sum(1))
        gap = proj(scaled(old_mean, old_std)) - other(scaled(new_mean, new_std))
    return gap.abs().max().item()


def layers_said() -> dict[str, str]:
    """LayerNorm and BatchNorm by hand and by torch, alone and in our models."""
    x = torch.tensor([[1.0, 2, 3], [3, 6, 9]]).double()
    layer = (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True, correction=0)
    batch = (x - x.mean(0)) / x.std(0, correction=0)
    norm = nn.BatchNorm1d(3, eps=1e-12).double()
    assert torch.allclose(nn.LayerNorm(3, eps=0).double()(x), layer)
    assert torch.allclose(norm(x), batch)
    assert torch.allclose(layer, nn.LayerNorm(3, eps=0).double()(5 * x))

    torch.manual_seed(0)
    tokens, maps = torch.randn(4, 5, 6).double(), torch.randn(4, 6, 5, 7).double()
    pairs = [
        (nn.LayerNorm(6).double()(tokens), tokens, 2),
        (nn.BatchNorm2d(6).double()(maps), maps, (0, 2, 3)),
        (nn.BatchNorm1d(6).double()(tokens.mT).mT, tokens, (0, 1)),
    ]
    for found, values, axes in pairs:
        middle = values - values.mean(axes, keepdim=True)
        by_hand = middle / (middle.square().mean(axes, keepdim=True) + 1e-5).sqrt()
        assert (found - by_hand).abs().max() < 1e-12
    with suppress(ValueError):  # "Expected more than 1 value per channel when training"
        nn.BatchNorm1d(3)(torch.zeros(1, 3))
        raise AssertionError("one image was enough for a batch norm")

    conv, bn = nn.Conv2d(3, 6, 3, bias=False).double(), nn.BatchNorm2d(6).double()
    images = torch.rand(4, 3, 9, 9).double()
    bn(conv(images))  # moves the statistics
    bn.eval()
    one = nn.Conv2d(3, 6, 3).double()
    with torch.no_grad():
        factor = bn.weight / (bn.running_var + bn.eps).sqrt()
        one.weight.copy_(conv.weight * factor.reshape(-1, 1, 1, 1))
        one.bias.copy_(bn.bias - bn.running_mean * factor)
        assert (one(images) - bn(conv(images))).abs().max() < 1e-12

    ours = load_pretrained(str(WEIGHTS)).model
    norms = [m for m in ours.modules() if isinstance(m, nn.LayerNorm)]
    held = sum(p.numel() for m in norms for p in m.parameters())
    return {
        "the tokens": f"[{row(x[0], 0)}] and [{row(x[1], 0)}].",
        "LayerNorm of both": f"Both tokens become [{row(layer[0], 2)}]",
        "BatchNorm": f"The tokens become [{row(batch[0], 0)}] and [{row(batch[1], 0)}]",
        "equal to torch": "equal torch's modules within 1e-12",
        "variances": f"The first feature has the values {x[0, 0]:.0f} and {x[1, 0]:.0f}: biased "
        f"variance {x[:, 0].var(correction=0):.0f}, unbiased variance {x[:, 0].var():.0f}",
        "running": f"With momentum {norm.momentum} the running variance goes from 1 to "
        f"0.9 · 1 + 0.1 · 2 = {norm.running_var[0]:.1f}, and the running mean from 0 "
        f"to {norm.running_mean[0]:.1f}",
        "LayerNorms of our ViT": f"{len(norms)} LayerNorms hold {held:,} of "
        f"{sum(p.numel() for p in ours.parameters()):,} parameters",
        **company_said(),
    }


@torch.no_grad()
def company_said() -> dict[str, str]:
    """How much the logits of one digit depend on the others of its batch."""
    torch.manual_seed(0)
    vit = VisionTransformer(ViTConfig(img_size=8, patch_size=4, in_chans=1, num_classes=10,
                                      embed_dim=64, depth=4, num_heads=4)).double()  # fmt: skip
    cnn = cnn_models.ResidualCNN(
        cnn_models.CNNConfig(in_chans=1, num_classes=10, dims=(17, 34, 69))
    ).double()
    data = load_data("digits")
    images = (data.train.images(slice(0, 200)).double() / 255 - data.mean[0]) / data.std[0]

    def spread(model: nn.Module, size: int) -> float:
        """Deviation of one digit's logits over ten sets of neighbours, against their size."""
        draw = torch.Generator().manual_seed(0)
        neighbours = [1 + torch.randperm(199, generator=draw)[: size - 1] for _ in range(10)]
        logits = torch.stack([model(images[[0, *rest.tolist()]])[0] for rest in neighbours])
        return (logits.std(0).norm() / logits.mean(0).norm()).item()

    first, second, third = (f"{100 * spread(cnn.train(), n):.0f} % in batches of {n}"
                            for n in (4, 16, 64))  # fmt: skip
    assert max(spread(vit.train(), 16), spread(vit.eval(), 16), spread(cnn.eval(), 16)) < 1e-12
    return {"company": f"vary by {first}, {second} and {third}"}


def numbers() -> dict[str, str]:
    said = images_said() | training_said()
    measured, again = wrong_numbers()
    for name, ends, moved, right in measured:
        said[f"mean and std, {name}"] = f"| {name} | {ends} | {moved:.1f} | {100 * right:.0f} % |"
    said["fitted anew"] = f"head fitted at the scale of digits, accuracy is {100 * again:.0f} %"
    accuracies = [right for *_, right in measured]
    assert accuracies[0] == max(accuracies)
    assert min(accuracies[:2]) > 2 * max(accuracies[2:])  # ImageNet's numbers are similar
    assert again > accuracies[0] - 0.05
    half_width = 1.96 * max(math.sqrt(p * (1 - p) / TEST) for p in (*accuracies, again, 0.5))
    said["uncertainty"] = (
        f"With {TEST} test images, each accuracy is uncertain by up to "
        f"{100 * half_width:.0f} points"
    )
    said["fitted and judged on"] = f"head on {TRAIN} digits with the ViT's own"
    said["judged on"] = f"classified {TEST} other digits"
    assert folded_gap() < 1e-12
    said["folded"] = "(checked to 1e-12)"
    return said | layers_said()


def draw() -> None:
    """The picture: which numbers share a mean, and what wrong numbers cost."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(12, 3.1), width_ratios=(1, 1, 1.7), layout="constrained"
    )
    line = torch.arange(6)
    groups = {
        "LayerNorm averages\nover one token": line[:, None].expand(6, 6),
        "BatchNorm averages\nover the batch": line.expand(6, 6),
    }
    for axes, (name, group) in zip((left, middle), groups.items(), strict=True):
        axes.imshow(group, cmap="Pastel1", vmin=0, vmax=8)
        axes.hlines([i + 0.5 for i in range(5)], -0.5, 5.5, color="white")
        axes.vlines([i + 0.5 for i in range(5)], -0.5, 5.5, color="white")
        axes.hlines(2.5, -0.5, 5.5, color="black")
        axes.set(title=name, xlabel="features", xticks=[])
        axes.set_yticks([1, 4], ["image 1:\n3 tokens", "image 2:\n3 tokens"])
    measured, _ = wrong_numbers()
    bars = right.barh([f"{name}\n({ends})" for name, ends, *_ in measured],
                      [100 * share for *_, share in measured], color="#c2571a")  # fmt: skip
    right.bar_label(bars, fmt="%.0f %%", padding=3)
    right.axvline(10, color="gray", linestyle=":")
    right.set(title="The wrong mean and std ruin\na pretrained ViT without a message",
              xlabel="accuracy on digits (%); dotted: chance",
              xlim=(0, 105))  # fmt: skip
    right.invert_yaxis()
    figure.savefig(ROOT / "theory" / "normalization.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers(), SOURCES)
