"""Normalising images and features: the numbers in normalisation.md.

python theory/normalisation.py                     # prints the steps, and fails if the text differs
python theory/normalisation.py --draw              # draws normalisation.png too
"""

import json
import sys
from contextlib import suppress

import torch
import torch.nn.functional as F
from _text import ROOT, check
from timm.data.constants import (
    IMAGENET_DEFAULT_MEAN,
    IMAGENET_DEFAULT_STD,
    IMAGENET_INCEPTION_MEAN,
    IMAGENET_INCEPTION_STD,
)
from torch import Tensor, nn

from lab.data import datasets, load_data
from lab.models import cnn as cnn_models
from lab.models import load_pretrained, registry
from model import VisionTransformer, ViTConfig

PUBLISHED = [0.491, 0.482, 0.447], [0.247, 0.243, 0.262]  # CIFAR-10, all training images
RUN = ROOT / "results" / "official" / "train" / "cifar10-jpeg-vit_128x6-pretraining"
WEIGHTS = ROOT / "weights" / "vit_128x6_cifar10.safetensors"
TRAIN, TEST = 200, 100  # digits that a head is fitted on, and judged by


def row(values, digits: int = 3) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def images_said() -> dict[str, str]:
    """The numbers of three datasets, and what an example pixel becomes."""
    record = json.loads((RUN / "config.json").read_text(encoding="utf-8"))["dataset"]
    mean, std = record["mean"], record["std"]
    pairs = zip(PUBLISHED[0] + PUBLISHED[1], mean + std, strict=True)
    gap = max(abs(a - b) for a, b in pairs)
    assert gap <= 0.0021
    counted = len(range(0, record["train"], -(-record["train"] // 10_000)))
    digits = load_data("digits")
    assert datasets.channel_statistics(digits.train) == (digits.mean, digits.std)
    pixels = digits.train.images(slice(None)).double() / 255
    assert torch.allclose(pixels.mean(), torch.tensor(digits.mean).double())
    own = pixels.flatten(1).std(1, correction=0).mean().item()
    red = 200 / 255
    return {
        "the example": f"200 / 255 = {red:.3f}",
        "normalised": f"({red:.3f} - {mean[0]:.3f}) / {std[0]:.3f} = "
                      f"{(red - mean[0]) / std[0]:.2f}",
        "black and white": f"{-mean[0] / std[0]:.2f} to {(1 - mean[0]) / std[0]:.2f}",
        "CIFAR-10": f"| {row(mean, 4)} | {row(std, 4)} | our run's record",
        "CIFAR-10, published": f"| {row(PUBLISHED[0])} | {row(PUBLISHED[1])} | Krizhevsky",
        "they differ": "by 0.002 at most",
        "a sample": f"{counted:,} of the {record['train']:,} training images",
        "error of the sample": f"{std[0]:.3f} / sqrt({counted:,}) = {std[0] / counted**0.5:.4f}",
        "digits": f"| {row(digits.mean)} | {row(digits.std)} | computed",
        "digits, image by image": f"the mean is {own:.3f}, not {digits.std[0]:.3f}",
        "ImageNet": f"| {row(IMAGENET_DEFAULT_MEAN)} | {row(IMAGENET_DEFAULT_STD)} | timm's",
        "one half": f"| {row(IMAGENET_INCEPTION_MEAN, 1)} | {row(IMAGENET_INCEPTION_STD, 1)} |",
    }  # fmt: skip


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
        "one direction": f"{shares[0]:.0f} % of the sum of squares, after it {shares[1]:.0f} %",
        "steps": f"{steps[0]} steps without and {steps[1]} with",
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
        "ImageNet's": (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
        "0.5 and 0.5": ([0.5] * 3, [0.5] * 3),
        "digits' own": (data.mean * 3, data.std * 3),
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
    again = head(features(train, *scales["digits' own"]), labels)(seen["digits' own"])
    return found, (again == answers).double().mean().item()


def folded_gap() -> float:
    """What is lost if another mean and std are put into the first layer's weights: nothing."""
    torch.manual_seed(0)
    old_mean, old_std = (torch.tensor(v).double() for v in PUBLISHED)
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
        "LayerNorm of both rows": f"[{row(layer[0], 2)}]",
        "BatchNorm, first row": f"[{row(batch[0], 0)}] and [{row(batch[1], 0)}]",
        "running mean": f"[{row(norm.running_mean, 1)}]",
        "running variance": f"[{row(norm.running_var, 1)}]",
        "equal to torch": "within 1e-12",
        "LayerNorms of our ViT": f"{len(norms)} LayerNorms hold {held:,} of the "
        f"{sum(p.numel() for p in ours.parameters()):,} weights",
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

    found = {f"batch of {n}": f"{100 * spread(cnn.train(), n):.0f} % in batches of {n}"
             for n in (4, 16, 64)}  # fmt: skip
    assert max(spread(vit.train(), 16), spread(vit.eval(), 16), spread(cnn.eval(), 16)) < 1e-12
    return found


def numbers() -> dict[str, str]:
    said = images_said() | training_said()
    measured, again = wrong_numbers()
    for name, ends, moved, right in measured:
        said[f"mean and std: {name}"] = f"| {name} | {ends} | {moved:.1f} | {100 * right:.0f} % |"
    said["fitted anew"] = f"{100 * again:.0f} % with a head fitted"
    assert folded_gap() < 1e-12
    return said | layers_said()


def draw() -> None:
    """The picture: which numbers share a mean, and what wrong numbers cost."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(10.5, 3.2), width_ratios=(1, 1, 1.7), layout="constrained"
    )
    line = torch.arange(6)
    groups = {
        "LayerNorm:\na row": line[:, None].expand(6, 6),
        "BatchNorm:\na column": line.expand(6, 6),
    }
    for axes, (name, group) in zip((left, middle), groups.items(), strict=True):
        axes.imshow(group, cmap="Pastel1", vmin=0, vmax=8)
        axes.hlines([i + 0.5 for i in range(5)], -0.5, 5.5, color="white")
        axes.vlines([i + 0.5 for i in range(5)], -0.5, 5.5, color="white")
        axes.hlines(2.5, -0.5, 5.5, color="black")
        axes.set(title=f"{name} shares a mean", xlabel="features", xticks=[])
        axes.set_yticks([1, 4], ["image 1:\n3 tokens", "image 2:\n3 tokens"])
    measured, _ = wrong_numbers()
    bars = right.barh([f"{name}\n({ends})" for name, ends, *_ in measured],
                      [100 * share for *_, share in measured],
                      color=["tab:green"] + ["tab:blue"] * 4)  # fmt: skip
    right.bar_label(bars, fmt="%.0f %%", padding=3)
    right.axvline(10, color="gray", linestyle=":")
    right.set(title="The same weights,\nother mean and std of the input",
              xlabel="digits right, %; dotted: chance",
              xlim=(0, 105))  # fmt: skip
    right.invert_yaxis()
    figure.savefig(ROOT / "theory" / "normalisation.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers())
