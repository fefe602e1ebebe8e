"""A ViT and a CNN on the same images: the numbers in vit_vs_cnn.md.

python theory/vit_vs_cnn.py                        # prints the steps, and fails if the text differs
python theory/vit_vs_cnn.py --draw                 # draws vit_vs_cnn.png too
"""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace

import torch
from _text import ROOT, check, claim
from torch import Tensor, nn

from lab.data import load_data
from lab.models import cnn as cnn_models
from lab.models import load_pretrained, profile_model, registry
from lab.report import Record, comparisons, read_runs, sentences
from model import VisionTransformer, ViTConfig

WEIGHTS = {name: ROOT / "weights" / f"{name}_64x4_mnist5k.safetensors" for name in ("vit", "cnn")}
CELL, GRID = 4, 7  # pixels of the ViT's patches and the CNN's last positions; grid of both
IMAGES = 40  # test images for the measurements of features, four of each digit
SOURCES = {  # definitions, and results of others
    "a 3 x 3 filter": "lab/models/cnn.py",
    "trained on mnist-5k by the same recipe": "the name of the data",
    "We train on mnist-5k from scratch": "the name of the data",
    "(0: nothing; 1: as much as images differ among themselves)": "definition",
    "If the image moves by 4 pixels, an equivariant map moves by 1 position": "definition",
    "| | map, 4 pixels | head, 1 pixel | head, 4 pixels |": "shift_errors()",
    "On CIFAR-10 (JPEG copy": "the name of the data",
    "pretrained on 300 million images, large ViTs beat ResNets; pretrained on ImageNet-1k they do "
    "not": "Dosovitskiy et al. 2021, figure 3",
    "Stronger augmentation (Touvron et al. 2021), a convolutional stem (Xiao et al. 2021)":
        "Touvron et al. 2021; Xiao et al. 2021",
}  # fmt: skip
COLORS = {"ViT": "#c2571a", "CNN": "#1f5fa8"}


def size(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


class Compared:
    """A trained ViT and its trained CNN twin, and test images of mnist-5k for both."""

    def __init__(self):
        given = {name: load_pretrained(str(path)) for name, path in WEIGHTS.items()}
        self.vit: VisionTransformer = given["vit"].model.double().eval()
        self.cnn: cnn_models.ResidualCNN = given["cnn"].model.double().eval()
        assert given["vit"].preprocess == given["cnn"].preprocess
        assert abs(size(self.cnn) / size(self.vit) - 1) < cnn_models.TOLERANCE
        (mean,), (std,) = given["vit"].preprocess.mean, given["vit"].preprocess.std
        data = load_data("mnist-5k").test
        self.test = (data.images(slice(None)).double() / 255 - mean) / std  # (B, 1, 28, 28)
        self.labels = data.labels
        self.images = self.test[:: len(self.test) // IMAGES]

    @torch.no_grad()
    def accuracy(self, model: nn.Module, by: int) -> float:
        """Test accuracy if all images move by some pixels down and right."""
        model, images = copy.deepcopy(model).float(), roll(self.test, by).float()
        logits = torch.cat([model(part) for part in images.split(250)])
        return (logits.argmax(1) == self.labels).double().mean().item()

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
    """The last features by position, (B, D, 7, 7)."""
    found = model.forward_features(images)
    return found if found.ndim == 4 else found[:, 1:].mT.unflatten(2, (GRID, GRID))


def head_input(model: nn.Module, images: Tensor) -> Tensor:
    """What the output layer reads: the class token, or the mean over positions, (B, D)."""
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
    models = {
        "CNN": both.cnn, "CNN without borders": both.without_borders(),
        "ViT": both.vit, "ViT without positions": both.without_positions(),
    }  # fmt: skip
    said, found = {}, {}
    for name, model in models.items():
        found[name] = shift_errors(model, both.images)
        words = ["0" if v < 1e-9 else f"{v:.2f}" for v in found[name]]
        said[f"shifts, {name}"] = f"| {name} | {' | '.join(words)} |"
    exact = [found[name] for name in ("CNN without borders", "ViT without positions")]
    said["whole cells"] = claim(
        f"and steps of the total stride, {CELL} pixels",
        *(along < 1e-9 < one for along, one, _ in exact),
    )
    accuracies = [[both.accuracy(model, by) for by in (0, CELL)] for model in (both.vit, both.cnn)]
    (vit, vit_moved), (cnn, cnn_moved) = ([100 * a for a in pair] for pair in accuracies)
    said["accuracy of moved images"] = claim(
        f"If all test images move by {CELL} pixels, the accuracy of the CNN falls from {cnn:.1f} % "
        f"to {cnn_moved:.1f} %, that of the ViT from {vit:.1f} % to {vit_moved:.1f} %",
        cnn_moved < cnn, vit_moved < vit,
    )  # fmt: skip
    return said


def seen(features: Callable[[Tensor], Tensor], image: Tensor) -> Tensor:
    """Size of the gradient of the map's middle position by pixel, (H, W)."""
    x = image.clone().requires_grad_()
    found = features(x)  # (1, D, rows, columns)
    middle = found.shape[2] // 2
    (grad,) = torch.autograd.grad(found[0, :, middle, middle].sum(), x)
    return grad[0].norm(dim=0)


def fields(both: Compared) -> dict[str, Tensor]:
    """What a position in the middle sees, after how much of each model."""
    cnn, vit, image = both.cnn, both.vit, both.images[:1]
    found = {"CNN, first convolution": seen(cnn.stem, image)}
    for stage in (1, 2, 3):
        found[f"CNN, stage {stage}"] = seen(nn.Sequential(cnn.stem, *cnn.layers[:stage]), image)
    for blocks in (0, 1):

        def tokens(x: Tensor, blocks: int = blocks) -> Tensor:
            return vit.blocks[:blocks](vit.embed(x))[:, 1:].mT.unflatten(2, (GRID, GRID))

        found[f"ViT, {('patches', 'first block')[blocks]}"] = seen(tokens, image)
    return found


@torch.no_grad()
def distances(model: VisionTransformer, images: Tensor) -> tuple[list[Tensor], float]:
    """By block the mean distance in pixels to what each head attends to, (h,); and if even."""
    line = torch.arange(GRID).double() * CELL
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
    said, sides, found = {}, [], fields(both)
    for field in found.values():
        rows = int((field > 0).any(1).sum())
        assert int((field > 0).sum()) == rows**2  # a square
        sides.append(rows)
    said["receptive fields"] = (
        f"| {' | '.join(found)} | {'|---' * len(found)}| "
        f"| {' | '.join(f'{side} x {side}' for side in sides)} |"
    )
    end = found["CNN, stage 3"]
    center = end[CELL * 2 : -CELL * 2, CELL * 2 : -CELL * 2].mean()
    said["growing"] = claim(
        "In the CNN it grows layer by layer, and even at the end the center counts most",
        sides[0] < sides[1] < sides[2] < sides[3], center > 2 * end.mean(),
    )  # fmt: skip
    said["figure"] = claim("Receptive fields grow in a CNN and are global in a ViT",
                           sides[0] < sides[3], sides[5] == GRID * CELL)  # fmt: skip
    trained, even = distances(both.vit, both.images)
    heads = torch.cat(trained)
    return said | {
        "attention distance": f"would be {even:.1f} pixels; the trained heads reach "
                              f"{heads.min():.1f} to {heads.max():.1f} pixels",
    }  # fmt: skip


@torch.no_grad()
def order_said(both: Compared) -> dict[str, str]:
    """The same patches in another order."""
    order = torch.randperm(GRID**2, generator=torch.Generator().manual_seed(0))
    parts = nn.functional.unfold(both.images, CELL, stride=CELL)[:, :, order]
    mixed = nn.functional.fold(parts, GRID * CELL, CELL, stride=CELL)
    found = []
    for model in (both.cnn, both.vit, both.without_positions()):
        read = head_input(model, both.images)
        usual = (read - read.mean(0)).norm()
        found.append(((head_input(model, mixed) - read).norm() / usual).item())
    return {
        "patches in another order": claim(
            f"the input of the head changes by {found[0]:.2f} (CNN), {found[1]:.2f} (ViT) and 0 "
            "(ViT without positions)",
            found[2] < 1e-9,
        )
    }


def costs_said() -> dict[str, str]:
    """A ViT-Ti/16 and its CNN twin at two resolutions."""
    small, large = sizes = (224, 448)
    config = ViTConfig(img_size=small, embed_dim=192, num_heads=3, num_classes=37)
    cnn = cnn_models.ResidualCNN(
        cnn_models.CNNConfig(num_classes=37, dims=(45, 89, 180, 360), stem_stride=4)
    )
    makers: dict[str, list[nn.Module]] = {
        "ViT-Ti/16": [VisionTransformer(replace(config, img_size=n)) for n in sizes],
        "CNN twin": [cnn, cnn],
    }
    assert abs(size(cnn) / size(makers["ViT-Ti/16"][0]) - 1) < cnn_models.TOLERANCE
    said = {
        "cost, models": f"a ViT with patches of {config.patch_size} pixels and a CNN of the same "
                        f"size (stem stride {cnn.config.stem_stride}), at {small} and {large} "
                        "pixels",
        "cost, head": f"| | parameters, {small} | parameters, {large} | multiply-adds, {small} "
                      f"| multiply-adds, {large} | ratio |",
    }  # fmt: skip
    macs_at_first = []
    for name, models in makers.items():
        facts = []
        for model, pixels in zip(models, sizes, strict=True):
            with torch.device("meta"):  # counted without memory or arithmetic
                facts.append(profile_model(model.to("meta"), (3, pixels, pixels)))
        weights, macs = ([f[key] for f in facts] for key in ("parameters", "macs"))
        macs_at_first.append(macs[0])
        said[f"cost, {name}"] = (
            f"| {name} | {weights[0]:,} | {weights[1]:,} | {macs[0] / 1e6:,.0f}M "
            f"| {macs[1] / 1e6:,.0f}M | {macs[1] / macs[0]:.2f} |"
        )
    said["cheaper"] = claim("Which one is cheaper depends on the stem: here it is the CNN",
                            macs_at_first[1] < macs_at_first[0])  # fmt: skip
    return said


def sharing_said(both: Compared) -> dict[str, str]:
    """Weights that all positions have in common, and what was trained."""
    stage = both.cnn.layers[0][0].conv1
    side = GRID * CELL
    dense = side**4 * stage.in_channels * stage.out_channels
    runs = {r.folder.name: r for r in read_runs(ROOT / "theory" / "patch_size").runs}
    vit, cnn = (runs[f"mnist-5k-{name}-s0"] for name in ("patch4", "cnn"))
    shared = ("EPOCHS", "BATCH_SIZE", "OPTIMIZER", "LEARNING_RATE", "SEED", "ROTATE", "TRANSLATE")
    assert all(vit.constants[key] == cnn.constants[key] for key in shared)

    def result(run: Record) -> str:
        return sentences.result(comparisons.Configuration([run]))

    return {
        "ViT": f"with {size(both.vit):,} parameters and patches of "
               f"{both.vit.patch_embed.proj.kernel_size[0]} pixels",
        "maps": claim(
            f"Both end in a map of {GRID} x {GRID} positions",
            *(maps(m, both.images[:1]).shape[2:] == (GRID, GRID) for m in (both.vit, both.cnn)),
        ),
        "CNN": f"[a residual CNN](../weights/{WEIGHTS['cnn'].stem}.md) with {size(both.cnn):,}",
        "accuracy": f"{vit.constants['EPOCHS']} epochs, one seed: the ViT reaches {result(vit)}, "
                    f"the CNN {result(cnn)}",
        "augmentation": f"shifted by up to {vit.constants['TRANSLATE']:.0f} pixels",
        "a convolution": f"A convolution of the CNN's first stage has {stage.weight.numel():,} "
                         "weights; a dense layer between the same maps would have "
                         f"{dense / 1e6:.0f} million",
        "tied to positions": f"only the {both.vit.pos_embed.numel():,} numbers of the position",
    }  # fmt: skip


def measured() -> tuple[
    list[comparisons.Configuration], list[comparisons.Configuration], dict[str, tuple]
]:
    """mnist-5k by number of training images, of the ViT and the CNN; and twins by dataset."""
    official = ROOT / "results" / "official"
    runs = [r for place in ("train", "cnn_baseline") for r in read_runs(official / place).runs]
    found = comparisons.configurations(runs)
    lines = [line for series in comparisons.efficiencies(found) for line in series]
    (vit,) = (line for line in lines if line[0].first.model == "vit_64x4")
    (cnn,) = (line for line in lines if line[0].first.model == "CNN twin of vit_64x4")
    twins = comparisons.twins(found)
    pairs = {v.first.config["dataset"]["name"]: (v, c) for how, v, c in twins
             if how == "epochs"}  # fmt: skip
    return vit, cnn, pairs


def data_said() -> dict[str, str]:
    vit, cnn, pairs = measured()
    said, gaps = {}, []
    for ours, theirs in zip(vit, cnn, strict=True):
        assert sentences.train_images(ours) == sentences.train_images(theirs)
        assert ours.first.constants["EPOCHS"] == theirs.first.constants["EPOCHS"]
        said[f"accuracy from {sentences.train_images(ours)} images"] = (
            f"| {sentences.images(ours)} | {sentences.result(ours)} | {sentences.result(theirs)} "
            f"| {100 * (theirs.mean - ours.mean):+.1f} |"
        )
        gaps.append(theirs.mean - ours.mean)
    said["every row"] = claim("The CNN is ahead in every row", min(gaps) > 0)
    said["figure, data"] = claim("the fewer images, the further the CNN is ahead",
                                 gaps == sorted(gaps, reverse=True))  # fmt: skip
    (epochs,) = {c.first.constants["EPOCHS"] for c in [*vit, *cnn]}
    (side,) = {c.first.constants["PATCH_SIZE"] for c in vit}
    said["other runs"] = claim(
        f"These runs differ from the models above: they last {epochs} epochs, the ViT has patches "
        f"of {side} pixels, and the CNN has as many multiply-adds as the ViT instead of as many "
        "parameters",
        side != CELL,
        *(c.first.config["twin_of"]["matched"] == "macs" for c in cnn),
    )
    ours, theirs = pairs["cifar10-jpeg"]
    said["CIFAR-10"] = claim(
        f"after {ours.first.constants['EPOCHS']} epochs the ViT has "
        f"{sentences.percent(ours.mean)} and the CNN {sentences.percent(theirs.mean)}, "
        "and the intervals do not overlap",
        theirs.around[0] > ours.around[1],
    )
    ours, theirs = pairs["digits"]
    costs = [c.first.config["model"]["macs"] / 1e6 for c in (ours, theirs)]
    said["costs on digits"] = claim(
        f"on digits it is the ViT, with {costs[0]:.1f}M multiply-adds against {costs[1]:.1f}M",
        costs[0] < costs[1],
    )
    said["test images"] = f"{vit[0].first.metrics['test_images']:,} test images"
    return said


def numbers() -> dict[str, str]:
    both = Compared()
    return (sharing_said(both) | locality_said(both) | shifts_said(both) | order_said(both)
            | costs_said() | data_said())  # fmt: skip


def draw() -> None:
    """The figure: receptive fields, and accuracy by the number of training images."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 5, figsize=(13.5, 3.3), width_ratios=(1, 1, 1, 1.15, 1.9), layout="constrained"
    )
    found = fields(Compared())
    shown = {"CNN, first convolution": "CNN, first convolution:\n3 x 3 pixels",
             "CNN, stage 1": "CNN, stage 1:\nstill local",
             "CNN, stage 3": "CNN, stage 3: all pixels,\nthe center most",
             "ViT, first block": "ViT, first block:\nalready all pixels"}  # fmt: skip
    for ax, (name, title) in zip(axes, shown.items(), strict=False):
        field = (found[name] / found[name].max()).clamp(min=1e-4).log10()
        image = ax.imshow(field, cmap="Greens", vmin=-4, vmax=0)
        ax.set_title(title, fontsize=10)
        ax.set(xticks=[0, 14, 27], yticks=[0, 14, 27], xlabel="pixels")
    axes[0].set_ylabel("pixels")
    figure.colorbar(image, ax=axes[3], label="gradient, log10 (0: largest)")
    for line, name in zip(measured()[:2], ("ViT", "CNN"), strict=True):
        x, y = [sentences.train_images(c) for c in line], [100 * c.mean for c in line]
        around = [[100 * abs(c.mean - c.around[end]) for c in line] for end in (0, 1)]
        axes[4].errorbar(x, y, around, marker="o", capsize=3, label=name, color=COLORS[name])
    axes[4].set_title("The fewer images, the further\nthe CNN is ahead (mnist-5k)", fontsize=10)
    axes[4].set(xscale="log", ylabel="test accuracy (%)", xlabel="training images")
    axes[4].set_xticks(x, [str(n) for n in x], minor=False, fontsize=8)
    axes[4].minorticks_off()
    axes[4].legend()
    axes[4].grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "vit_vs_cnn.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers(), SOURCES)
