"""A ViT and a CNN on the same images: the numbers in vit_vs_cnn.md.

python theory/vit_vs_cnn.py                        # prints the steps, and fails if the text differs
python theory/vit_vs_cnn.py --draw                 # draws vit_vs_cnn.png too
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from _text import ROOT, check
from scipy.stats import ttest_ind
from torch import Tensor, nn

from lab.data import load_data
from lab.models import cnn as cnn_models
from lab.models import load_pretrained, profile_model, registry
from lab.report import comparisons, read_runs, sentences
from model import VisionTransformer, ViTConfig

WEIGHTS = ROOT / "weights" / "vit_128x6_cifar10.safetensors"
RESULTS = ROOT / "results"
CELL = 4  # pixels: a patch of the ViT, and a place of the CNN's last map, which are 8 x 8 both
DIGIT, IMAGES = 20, 8  # pixels of a digit's side, on a black image of 32; how many digits


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Compared:
    """Our trained ViT, its CNN twin at random weights, and digits of 32 pixels for both."""

    def __init__(self):
        given = load_pretrained(str(WEIGHTS))
        self.vit: VisionTransformer = given.model.double()
        torch.manual_seed(0)
        self.cnn = cnn_models.ResidualCNN(
            cnn_models.CNNConfig(num_classes=10, dims=(42, 85, 168))
        ).double()
        assert abs(size(self.cnn) / size(self.vit) - 1) < cnn_models.TOLERANCE
        mean, std = (torch.tensor(v).double().reshape(1, 3, 1, 1)
                     for v in (given.preprocess.mean, given.preprocess.std))  # fmt: skip
        images = load_data("digits").test.images(slice(0, IMAGES))
        digits = replace(given.preprocess, img_size=DIGIT).center_crop(images).double()
        edge = (32 - DIGIT) // 2
        self.images = (nn.functional.pad(digits, (edge,) * 4) - mean) / std  # (B, 3, 32, 32)
        for module in self.cnn.modules():
            if isinstance(
                module, cnn_models.ResidualBlock
            ):  # at 0, as training starts, a block does nothing
                nn.init.ones_(module.bn2.weight)
            elif isinstance(module, nn.BatchNorm2d):
                module.momentum = 1.0
        self.cnn(self.images)  # gives the batch norms their statistics
        self.cnn.eval()

    def without_borders(self) -> cnn_models.ResidualCNN:
        """The CNN on an image whose right side touches its left, and whose top its bottom."""
        model = copy.deepcopy(self.cnn)
        for module in model.modules():
            if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1):
                module.padding_mode = "circular"
                module._reversed_padding_repeated_twice = [1] * 4
        return model

    def without_positions(self) -> VisionTransformer:
        model = copy.deepcopy(self.vit)
        nn.init.zeros_(model.pos_embed)
        return model


def maps(model: nn.Module, images: Tensor) -> Tensor:
    """The last features by place, (B, D, 8, 8)."""
    found = model.forward_features(images)
    return found if found.ndim == 4 else found[:, 1:].mT.unflatten(2, (8, 8))


def head_input(model: nn.Module, images: Tensor) -> Tensor:
    """What the output layer reads: the class token, or the mean over places, (B, D)."""
    cnn = isinstance(model, cnn_models.ResidualCNN)
    return (
        model.forward_features(images).mean((2, 3))
        if cnn
        else registry.pooled_features(model, images)
    )


def roll(x: Tensor, by: int) -> Tensor:
    """Everything moves down and right; what leaves comes in again on the other side."""
    return x.roll((by, by), dims=(2, 3))


@torch.no_grad()
def shift_errors(model: nn.Module, images: Tensor) -> tuple[float, float, float]:
    """How far maps are from moving along by one cell; how far the head's input moves, 1 and 4 px.

    All in units of the features' deviation from their mean over images.
    """
    before = maps(model, images)
    usual = (before - before.mean(0)).norm()
    along = ((maps(model, roll(images, CELL)) - roll(before, 1)).norm() / usual).item()
    read = head_input(model, images)
    usual = (read - read.mean(0)).norm()
    moved = [
        ((head_input(model, roll(images, by)) - read).norm() / usual).item() for by in (1, CELL)
    ]
    return along, *moved


def shifts_said(both: Compared) -> dict[str, str]:
    torch.manual_seed(0)
    models = {
        "CNN, untrained": both.cnn, "the same without borders": both.without_borders(),
        "ViT, untrained": VisionTransformer(both.vit.config).double(),
        "ViT, trained": both.vit, "the same without positions": both.without_positions(),
    }  # fmt: skip
    said = {}
    for name, model in models.items():
        values = shift_errors(model, both.images)
        words = ["0" if v < 1e-9 else f"{v:.1f}" for v in values]
        said[f"shifts, {name}"] = f"| {name} | {' | '.join(words)} |"
    return said


def seen(features: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Size of the gradient of the map's middle place by pixel, (H, W)."""
    x = image.clone().requires_grad_()
    found = features(x)  # (1, D, rows, columns)
    middle = found.shape[2] // 2
    (grad,) = torch.autograd.grad(found[0, :, middle, middle].sum(), x)
    return grad[0].norm(dim=0)


def fields(both: Compared) -> dict[str, Tensor]:
    """What a place in the middle sees, after how much of each model."""
    cnn, vit, image = both.cnn, both.vit, both.images[:1]
    found = {"CNN, first convolution": seen(cnn.stem, image)}
    for stage in (1, 2, 3):
        found[f"CNN, stage {stage}"] = seen(nn.Sequential(cnn.stem, *cnn.layers[:stage]), image)
    for blocks in (0, 1):

        def tokens(x: Tensor, blocks: int = blocks) -> Tensor:
            return vit.blocks[:blocks](vit.embed(x))[:, 1:].mT.unflatten(2, (8, 8))

        found[f"ViT, {('patches', 'first block')[blocks]}"] = seen(tokens, image)
    return found


@torch.no_grad()
def distances(model: VisionTransformer, images: Tensor) -> tuple[list[Tensor], float]:
    """By block the mean distance in pixels to what each head attends to, (h,); and if even."""
    line = torch.arange(8).double() * CELL
    grid = torch.cartesian_prod(line, line)
    apart = torch.cdist(grid, grid)  # (N, N)
    x, found = model.embed(images), []
    for block in model.blocks:
        weights = block.attn(block.norm1(x), return_weights=True)[1][:, :, 1:, 1:]
        weights = weights / weights.sum(-1, keepdim=True)
        found.append((weights * apart).sum(-1).mean((0, 2)))
        x = block(x)
    return found, apart.mean().item()


def locality_said(both: Compared) -> dict[str, str]:
    said = {}
    for name, field in fields(both).items():
        rows = int((field > 0).any(1).sum())
        assert int((field > 0).sum()) == rows**2  # a square
        said[f"seen after {name}"] = f"| {name} | {rows} x {rows} |"
    trained, even = distances(both.vit, both.images)
    torch.manual_seed(0)
    fresh = torch.cat(distances(VisionTransformer(both.vit.config).double(), both.images)[0])
    assert (fresh - even).abs().max() < 0.5
    said["even attention"] = f"{even:.0f} pixels away"
    said["heads of the trained ViT"] = (
        f"between {torch.cat(trained).min():.0f} and {torch.cat(trained).max():.0f} pixels"
    )
    return said


@torch.no_grad()
def order_said(both: Compared) -> dict[str, str]:
    """The same patches in another order."""
    torch.manual_seed(0)
    order = torch.randperm(64)
    parts = nn.functional.unfold(both.images, CELL, stride=CELL)[:, :, order]
    mixed = nn.functional.fold(parts, 32, CELL, stride=CELL)
    said = {}
    models = {"CNN": both.cnn, "ViT": both.vit, "ViT without positions": both.without_positions()}
    for name, model in models.items():
        read = head_input(model, both.images)
        usual = (read - read.mean(0)).norm()
        moved = ((head_input(model, mixed) - read).norm() / usual).item()
        said[f"patches in disorder, {name}"] = (
            f"{name} 0" if moved < 1e-9 else f"{name} {moved:.1f}"
        )
    return said


def costs_said() -> dict[str, str]:
    """A ViT-Ti/16 and its CNN twin at two resolutions."""
    said = {}
    config = ViTConfig(img_size=224, embed_dim=192, num_heads=3, num_classes=37)
    cnn = cnn_models.ResidualCNN(
        cnn_models.CNNConfig(num_classes=37, dims=(45, 89, 180, 360), stem_stride=4)
    )
    makers: dict[str, list[nn.Module]] = {
        "ViT-Ti/16": [VisionTransformer(replace(config, img_size=n)) for n in (224, 448)],
        "CNN twin": [cnn, cnn],
    }
    assert abs(size(cnn) / size(makers["ViT-Ti/16"][0]) - 1) < cnn_models.TOLERANCE
    for name, models in makers.items():
        facts = []
        for model, pixels in zip(models, (224, 448), strict=True):
            with torch.device("meta"):  # counted without memory or arithmetic
                facts.append(profile_model(model.to("meta"), (3, pixels, pixels)))
        weights, macs = ([f[key] for f in facts] for key in ("parameters", "macs"))
        said[f"cost, {name}"] = (
            f"| {name} | {weights[0]:,} | {weights[1]:,} | {macs[0] / 1e6:,.0f}M "
            f"| {macs[1] / 1e6:,.0f}M | {macs[1] / macs[0]:.2f} |"
        )
    return said


def sharing_said(both: Compared) -> dict[str, str]:
    """Weights that every place has in common."""
    stage = both.cnn.layers[0][0].conv1
    rows = 32 * 32 * stage.in_channels
    dense = rows * 32 * 32 * stage.out_channels
    return {
        "of the CNN": f"{size(both.cnn):,} parameters",
        "of the ViT": f"{size(both.vit):,} parameters",
        "a convolution": f"{stage.weight.numel():,} weights; a dense layer between the same maps "
                         f"would have {dense / 1e9:.1f} billion",
        "tied to places": f"only {both.vit.pos_embed.numel():,}",
    }  # fmt: skip


def measured() -> tuple[
    list[comparisons.Configuration], list[comparisons.Configuration], dict[str, tuple]
]:
    """Digits by number of training images, of the ViT and the CNN; and twins by dataset."""
    official = RESULTS / "official"
    runs = [r for place in ("train", "cnn_baseline") for r in read_runs(official / place).runs]
    found = comparisons.configurations(runs, RESULTS)
    lines = [line for series in comparisons.efficiencies(found, RESULTS) for line in series]
    (vit,) = (line for line in lines if line[0].first.model == "vit_64x4")
    (cnn,) = (line for line in lines if line[0].first.model == "CNN twin of vit_64x4")
    twins = comparisons.twins(found, RESULTS)
    pairs = {v.first.config["dataset"]["name"]: (v, c) for how, v, c in twins
             if how == "epochs"}  # fmt: skip
    return vit, cnn, pairs


def seen_images(c: comparisons.Configuration) -> int:
    return c.first.config["dataset"]["train_images"]


def data_said() -> dict[str, str]:
    vit, cnn, pairs = measured()
    said = {}
    for ours, theirs in zip(vit, cnn, strict=True):
        assert seen_images(ours) == seen_images(theirs)
        assert ours.first.constants["EPOCHS"] == theirs.first.constants["EPOCHS"]
        said[f"accuracy from {seen_images(ours)} images"] = (
            f"| {seen_images(ours):,} | {sentences.result(ours)} | {sentences.result(theirs)} "
            f"| {100 * (theirs.mean - ours.mean):+.1f} |"
        )
        assert theirs.mean > ours.mean
        apart = theirs.around[0] > ours.around[1]
        assert apart == (seen_images(ours) == 10) or len(ours.runs) > 1
    ours, theirs = pairs["cifar10-jpeg"]
    said["CIFAR-10"] = (
        f"after {ours.first.constants['EPOCHS']} epochs the ViT has "
        f"{sentences.percent(ours.mean)} and the CNN {sentences.percent(theirs.mean)}"
    )
    ours, theirs = pairs["digits"]
    p = ttest_ind(ours.accuracies, theirs.accuracies, equal_var=False).pvalue
    said["over seeds"] = (
        f"Welch's t-test over {len(ours.runs)} and {len(theirs.runs)} seeds, p = {p:.2g}"
    )
    costs = [c.first.config["model"]["macs"] / 1e6 for c in (ours, theirs)]
    said["costs on digits"] = f"{costs[0]:.1f}M multiply-adds against {costs[1]:.1f}M"
    return said


def numbers() -> dict[str, str]:
    both = Compared()
    return (sharing_said(both) | locality_said(both) | shifts_said(both) | order_said(both)
            | costs_said() | data_said())  # fmt: skip


def draw() -> None:
    """The picture: what a place sees, and accuracy by the number of training images."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 5, figsize=(12, 2.9), width_ratios=(1, 1, 1, 1, 1.9), layout="constrained"
    )
    shown = ("CNN, first convolution", "CNN, stage 1", "CNN, stage 3", "ViT, first block")
    found = fields(Compared())
    for ax, name in zip(axes, shown, strict=False):
        field = found[name] / found[name].max()
        ax.imshow(field.clamp(min=1e-4).log10(), cmap="Blues", vmin=-4, vmax=0)
        ax.set(title=name, xticks=[0, 16, 31], yticks=[0, 16, 31])
    axes[0].set_ylabel("pixel")
    for line, name in zip(measured()[:2], ("ViT", "CNN of its size"), strict=True):
        x, y = [seen_images(c) for c in line], [100 * c.mean for c in line]
        around = [[100 * abs(c.mean - c.around[end]) for c in line] for end in (0, 1)]
        axes[4].errorbar(x, y, around, marker="o", capsize=3, label=name)
    axes[4].set(title="digits: accuracy by training images", xscale="log",
                ylabel="test accuracy, %",
                xlabel="training images, equal number of steps")  # fmt: skip
    axes[4].set_xticks(x, [str(n) for n in x], minor=False)
    axes[4].minorticks_off()
    axes[4].legend()
    axes[4].grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "vit_vs_cnn.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers())
