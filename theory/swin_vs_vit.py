"""Windows instead of global attention: the numbers in swin_vs_vit.md.

python theory/swin_vs_vit.py                       # prints the steps, and fails if the text differs
python theory/swin_vs_vit.py --draw                # draws swin_vs_vit.png too
"""

import math
import sys
from statistics import mean
from types import SimpleNamespace

import timm
import torch
from _text import ROOT, check, claim
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from lab.report import comparisons, read_runs, sentences

SOURCES = {  # definitions of the example, names, and results of others
    "## A worked example: 8 x 8 patches in windows of 4 x 4": "the example",
    "half their side, 2 patches. The patch in row 4, column 4 was": "the example, see reached()",
    "such as our patches of 4 pixels on CIFAR-10": "weights/vit_128x6_cifar10.md",
    "pretrained with windows of 12 x 12 patches at 192 pixels": "the name of the model",
    "ImageNet-22k (Microsoft's name for ImageNet-21k, 14 million images)": "Deng et al. 2009",
    "fine-tuned on ImageNet-1k": "the name of the model",
    "version 2, size base": "the name of the model",
    "Version 2 (Liu et al. 2022) makes": "the name of the model",
    "In version 1, a change from": "definition",
    "Version 2 computes $B$ from the offset": "Liu et al. 2022, section 3.3",
    r"$\text{sign}(x) \ln(1 + |x|)$": "Liu et al. 2022, section 3.3",
    "`window12to16`, `192to256`": "the name of the model",
    "Earlier weights of the same Swin, with 62.4 % on CIFAR-10, led to only 70.4 ± 1.8 %":
        "the records before commit 1e31891",
    "one pretrained model of each kind, and two small datasets": "the records above",
}  # fmt: skip
CARD = "swinv2_base_window12to16_192to256.ms_in22k_ft_in1k"
C, M, PATCH = 96, 7, 4  # Swin-T's first stage: channels, patches along a window, pixels of a patch
SIZES = (224, 448, 672, 896, 1024)  # pixels
COLORS = {"ViT": "#c2571a", "Swin": "#7b4fa3"}
NAMES = {"ViT-S/16": "vit_small_patch16_224", "Swin-T": "swin_tiny_patch4_window7_224"}


def all_pairs(patches: int, dim: int) -> int:
    """Liu et al. 2021, equation 1: multiply-adds of attention between all patches."""
    return 4 * patches * dim**2 + 2 * patches**2 * dim


def in_windows(patches: int, dim: int, window: int) -> int:
    """Liu et al. 2021, equation 2: the same in windows of window x window patches."""
    return 4 * patches * dim**2 + 2 * window**2 * patches * dim


def counts(model: nn.Module, size: int) -> dict[str, int]:
    """Multiply-adds of a forward pass by module, counted by torch, without arithmetic."""
    images = torch.zeros(1, 3, size, size, device="meta")
    counter = FlopCounterMode(display=False, depth=None)
    with sdpa_kernel(SDPBackend.MATH), torch.no_grad(), counter:  # fused kernels count otherwise
        model.to("meta").eval()(images)
    return {name: sum(by.values()) // 2 for name, by in counter.get_flop_counts().items()}


def one_layer(size: int) -> tuple[int, int]:
    """Counted: attention of Swin-T's first block, and of all pairs of the same patches."""
    with torch.device("meta"):
        swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=size)
        plain = VisionTransformer(size, PATCH, embed_dim=C, depth=1, num_heads=3,
                                  class_token=False, global_pool="avg")  # fmt: skip
    windows = counts(swin, size)["SwinTransformer.layers.0.blocks.0.attn"]
    return counts(plain, size)["VisionTransformer.blocks.0.attn"], windows


def whole(name: str, size: int) -> int:
    """Counted: a whole model of timm's."""
    with torch.device("meta"):
        model = timm.create_model(name, img_size=size)
    return counts(model, size)["Global"]


def cost_said() -> dict[str, str]:
    said, both, by_formula = {}, {}, []
    for size in (224, 896):  # both fill whole windows
        patches = (size // PATCH) ** 2
        both[size] = one_layer(size)
        by_formula.append(both[size] == (all_pairs(patches, C), in_windows(patches, C, M)))
        ratio = both[size][0] / both[size][1]
        said[f"one layer at {size} pixels"] = (
            f"| {size} | {patches:,} | {both[size][0] / 1e6:,.0f}M | {both[size][1] / 1e6:,.0f}M "
            f"| {ratio:.0f} |"
        )
    said["layer"] = f"for the first layer of Swin-T (C = {C}, M = {M})"
    said["formulas"] = claim(
        "(Liu et al. 2021, equations 1 and 2) $$\\underbrace{4 hw C^2 + 2 (hw)^2 C}"
        "_{\\text{global, as in a ViT}} \\qquad\\qquad \\underbrace{4 hw C^2 + 2 M^2 hw C}"
        "_{\\text{windows}}$$",
        *by_formula,
    )
    said["linear"] = claim("the cost of windows grows linearly with the number of patches",
                           in_windows(8 * 64, C, M) == 8 * in_windows(64, C, M))  # fmt: skip
    growth = [new / old for new, old in zip(both[896], both[224], strict=True)]
    said["16 times as many patches"] = (
        f"With {(896 // 224) ** 2} times as many patches, windows cost {growth[1]:.0f} times as "
        f"much and global attention {growth[0]:.0f} times"
    )
    with torch.device("meta"):
        models = [timm.create_model(name) for name in NAMES.values()]
    held = [sum(p.numel() for p in model.parameters()) / 1e6 for model in models]
    pairs = []
    for size in (224, 896):
        small, swin = (whole(name, size) for name in NAMES.values())
        pairs.append(f"{small / 1e9:.1f}G against {swin / 1e9:.1f}G at {size} pixels")
    said["whole models"] = (
        f"ViT-S/16 against Swin-T ({held[0]:.0f} and {held[1]:.0f} million parameters), "
        f"we count {', '.join(pairs)}"
    )
    return said


def reached(blocks: nn.Module, row: int, column: int, side: int) -> Tensor:
    """Patches that the output at one place depends on, (side, side)."""
    x = torch.randn(1, side, side, 16, requires_grad=True)
    blocks(x)[0, row, column].sum().backward()
    return x.grad[0].abs().sum(-1) > 1e-9  # a masked weight is exp(-100), not 0


def windows_said() -> dict[str, str]:
    """An 8 x 8 grid in windows of 4 x 4: what is seen, how many windows, what is masked."""
    torch.manual_seed(0)

    def block(shift: int) -> SwinTransformerBlock:
        made = SwinTransformerBlock(16, (8, 8), num_heads=2, window_size=4, shift_size=shift)
        return made.eval()

    seen = []
    for stack in ([block(0)], [block(0), block(2)], [block(0), block(0)]):
        seen.append(int(reached(nn.Sequential(*stack), 3, 3, 8).sum()))
    corner = reached(block(2), 0, 0, 8)
    assert corner[:2, :2].all()
    assert corner.sum() == 4  # its window is completed by the other three corners, and masked
    shifted = block(2).attn_mask
    assert shifted.shape == (4, 16, 16)
    regions = sum(len({tuple(r.tolist()) for r in window == 0}) for window in shifted)
    assert regions == 3 * 3  # cut after 2 and after 6 patches
    layer = block(0)
    tile = torch.randn(1, 4, 4, 16)
    out = layer(tile.repeat(1, 2, 2, 1))
    assert torch.allclose(out[:, :4, :4], out[:, 4:, 4:], atol=1e-6)  # place counts inside only
    assert seen[1] == 8 * 8
    return {
        "a window": f"four windows of {seen[0]} patches",
        "one block": f"After one block the patch has seen {seen[0]} patches, and after a second "
                     f"one with the same windows still {seen[2]}",
        "a second, shifted": f"After both blocks it has seen all {seen[1]} patches",
        "pieces": f"3 x 3 = {regions} pieces",
        "windows": f"so that {shifted.shape[0]} windows of full size remain",
        "corner": f"The corner patch attends to the {int(corner.sum())} patches of its own piece",
        "relative positions": f"The {(M * M) ** 2:,} pairs of a 7 x 7 window have only "
                              f"$(2 \\cdot 7 - 1)^2$ = {(2 * M - 1) ** 2} different offsets",
    }  # fmt: skip


def card_said() -> dict[str, str]:
    """The model that the lab names, built by timm without weights."""
    facts = timm.get_pretrained_cfg(CARD)
    with torch.device("meta"):
        swin = timm.create_model(CARD)
    stages = [(layer.depth, layer.blocks[0].attn) for layer in swin.layers]
    window, last = stages[0][1].window_size[0], stages[-1][1].window_size[0]
    side, end = (layer.blocks[0].input_resolution[0] for layer in (swin.layers[0], swin.layers[-1]))
    assert (last, facts.input_size[1:]) == (end, (256, 256))
    assert facts.mean == timm.data.IMAGENET_DEFAULT_MEAN
    million = sum(p.numel() for p in swin.parameters()) / 1e6
    pixels = facts.input_size[1]
    macs = counts(swin, pixels)["Global"] / 1e9
    return {
        "card, size": f"{swin.embed_dim} channels in stage 1, blocks "
                      f"{', '.join(str(depth) for depth, _ in stages)}, heads "
                      f"{', '.join(str(a.num_heads) for _, a in stages)}; "
                      f"{million:.1f}M parameters, {macs:.1f}G multiply-adds",
        "card, window": f"fine-tuned with windows of {window} x {window} at {pixels} pixels",
        "card, head": f"so the head has {facts.num_classes:,} outputs",
        "card, input": f"The input is {pixels} x {pixels} pixels with ImageNet's mean",
        "card, tokens": f"Patches of {pixels // side} pixels give {side} x {side} tokens in "
                        f"{(side // window) ** 2} windows; the last stage has {end} x {end} "
                        f"tokens, so its window shrinks to {last}",
    }  # fmt: skip


def records_said(found: list[comparisons.Configuration]) -> dict[str, str]:
    """Swin and ViT of about the same size on a tenth of mnist-5k, over seeds: from the records."""
    runs = {c.name: c for c in found}

    def both(suffix: str) -> list[comparisons.Configuration]:
        return [runs[f"mnist-5k-of0.1-{name}_cifar10-{suffix}"]
                for name in ("vit_128x6", "swin_48x222")]  # fmt: skip

    before = [runs[f"cifar10-jpeg-{name}-pretraining-muon"]
              for name in ("vit_128x6", "swin_48x222")]  # fmt: skip
    models = [SimpleNamespace(**c.first.config["model"]) for c in both("full")]
    rows = {"full, layer decay 0.7": both("full-decay0.7"), "full": both("full"),
            "head only": both("head"), "from scratch": both("scratch")}  # fmt: skip
    (epochs,) = {c.first.constants["EPOCHS"] for pair in rows.values() for c in pair}
    images = sentences.images(rows["full"][0])
    said = {
        "records, epochs": f"fine-tuned them on a tenth of mnist-5k ({images} images) for "
                           f"{epochs} epochs at the default learning rate of each mode",
        "records, models": "| " + " | ".join(
            f"{m.parameters / 1e6:.2f}M; {m.macs / 1e6:.1f}M" for m in models) + " |",
        "records, cost": f"Swin needs {100 * models[1].macs / models[0].macs:.0f} % of the "
                         "multiply-adds",
        "records, before": "| accuracy on CIFAR-10 before | " + " | ".join(
            map(sentences.result, before)) + " |",
    }  # fmt: skip
    p_values, pretrained = {}, [c.first for c in before]
    resized = pretrained[0].config["model"]["small_images"]["epochs"]
    for name, (vit, swin) in rows.items():
        said[f"records, {name}"] = (
            f"| {name} | {sentences.result(vit)} | {sentences.result(swin)} |"
        )
        p_values[name] = comparisons.welch(vit, swin)
    (vit, swin), (bare_vit, bare_swin) = rows["full, layer decay 0.7"], rows["from scratch"]
    first = [mean(run.history[0]["val_accuracy"] for run in c.runs) for c in (vit, swin)]
    return said | {
        "pretraining": claim(
            f"with Muon (the ViT for {pretrained[0].metrics['epochs']} epochs, the first {resized} "
            f"on half-size images; Swin for {pretrained[1].metrics['epochs']} epochs)",
            all(run.constants["OPTIMIZER"] == "muon" for run in pretrained)),
        "accuracy": claim(
            "after full fine-tuning without layer decay, the models do not differ significantly "
            f"(Welch's t-test, p = {p_values['full']:.2f}). Swin is ahead with layer decay, with "
            "only the head trained and from scratch (p < 0.001 each)",
            p_values["full"] > 0.05,
            all(p < 0.001 for name, p in p_values.items() if name != "full"),
            all(b.mean > a.mean for name, (a, b) in rows.items() if name != "full"),
        ),
        "scratch": claim(
            f"Swin leads by {100 * (bare_swin.mean - bare_vit.mean):.0f} points from scratch, but "
            f"only by {100 * (swin.mean - vit.mean):.0f} points when both are pretrained and "
            "fine-tuned with layer decay",
            bare_swin.mean - bare_vit.mean > 5 * (swin.mean - vit.mean),
        ),
        "convergence": f"with layer decay the models classify {sentences.percent(first[0])} (ViT) "
                       f"and {sentences.percent(first[1])} (Swin) of the validation images "
                       "correctly after one epoch",
        "before": claim("although the pretrained ViT scores higher on CIFAR-10",
                        before[0].mean > before[1].mean),
    }  # fmt: skip


def pets_said(found: list[comparisons.Configuration]) -> dict[str, str]:
    """Both models, fine-tuned on three breeds of Oxford Pets with several seeds."""
    runs = {c.name: c for c in found}
    vit, swin = (runs[f"pets-3breeds-64-{name}_cifar10-full-decay0.7"]
                 for name in ("vit_128x6", "swin_48x222"))  # fmt: skip
    first = vit.first
    p = comparisons.welch(vit, swin)
    return {
        "Pets": (
            f"After {first.metrics['epochs']} epochs at {first.constants['IMG_SIZE']} pixels with "
            f"layer decay {first.constants['LAYER_DECAY']}, the ViT reaches "
            f"{sentences.result(vit)} and Swin {sentences.result(swin)} on the "
            f"{first.metrics['test_images']} test images"
        ),
        "Pets, test": claim(
            f"the difference is not significant (Welch's t-test, p = {p:.2f})", p > 0.05
        ),
    }  # fmt: skip


@torch.no_grad()
def stages_said() -> dict[str, str]:
    swin = timm.create_model("swin_tiny_patch4_window7_224").to("meta")
    maps = swin.forward_intermediates(torch.zeros(1, 3, 224, 224, device="meta"),
                                      intermediates_only=True)  # fmt: skip
    shapes = [f"{m.shape[2]} x {m.shape[3]} x {m.shape[1]}" for m in maps]
    merge = swin.layers[1].downsample.reduction
    side = swin.patch_embed.patch_size[0]
    assert merge.in_features == 4 * C
    return {
        "patches": f"patches of {side} pixels, and **patch merging** concatenates each 2 x 2 group",
        "head": claim("There is no class token; the head reads the mean of the last feature map",
                      swin.head.global_pool.pool_type == "avg", not hasattr(swin, "cls_token")),
        "the maps": f"At 224 pixels its maps are {', '.join(shapes)}",
        "merging": f"into {merge.in_features} numbers, mapped to {merge.out_features}",
    }  # fmt: skip


def with_larger(layer: nn.Module, factor: float) -> Tensor:
    """The largest weight of each row, on average, if q and k are multiplied by a factor."""
    dim = layer.dim
    layer.qkv.weight.data[: 2 * dim] *= factor
    found = []
    handle = layer.softmax.register_forward_hook(lambda _, __, out: found.append(out))
    layer(torch.randn(4, 49, dim, generator=torch.Generator().manual_seed(0)).double())
    handle.remove()
    layer.qkv.weight.data[: 2 * dim] /= factor
    return found[0]


@torch.no_grad()
def second_said() -> dict[str, str]:
    """What Swin v2 changed, each on a layer of timm's."""
    torch.manual_seed(0)
    first = WindowAttention(96, 3, window_size=7).double()
    second = WindowAttentionV2(96, (7, 7), 3).double()
    for layer in (first, second):
        nn.init.zeros_(layer.qkv.bias) if layer.qkv.bias is not None else None
    plain, large = (with_larger(first, f).amax(-1).mean().item() for f in (1, 10))
    assert (with_larger(second, 1) - with_larger(second, 10)).abs().max() < 1e-9

    branches, tokens = {}, {}
    for name, kind in (("v1", SwinTransformerBlock), ("v2", SwinTransformerV2Block)):
        block = kind(96, (7, 7), 3, window_size=7).double().eval()
        x = torch.randn(1, 7, 7, 96).double()
        before = block(x) - x
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight *= 10
            last.bias *= 10
        branches[name] = ((block(x) - x).norm() / before.norm()).item()
        deep = x
        for _ in range(6):
            deep = block(deep)
        tokens[name] = (deep.norm() / x.norm()).item()
    small = WindowAttentionV2(96, (8, 8), 3)
    wide = WindowAttentionV2(96, (16, 16), 3, pretrained_window_size=(8, 8))
    inner = wide.relative_coords_table[:, 8:-8, 8:-8]
    assert torch.allclose(inner, small.relative_coords_table)
    mlp = sum(p.numel() for p in wide.cpb_mlp.parameters())
    assert mlp == sum(p.numel() for p in small.cpb_mlp.parameters())
    # Offsets reach 7 in a window of 8 patches and 15 in a window of 16.
    linear, logs = (15 - 7) / 7, math.log(1 + 15) / math.log(1 + 7) - 1
    entries = [(2 * window - 1) ** 2 for window in (8, 16)]
    return {
        "v1, q and k 10 times larger": claim(
            "If q and k are 10 times as large, the mean largest weight rises from "
            f"{plain:.2f} to {large:.2f} in a layer of version 1; in version 2 nothing changes",
            large > plain,
        ),
        "a branch, 10 times larger": "both branches are 10 times as large, version 1 adds "
                                     f"{branches['v1']:.0f} times as much to the tokens, version 2 "
                                     f"adds {branches['v2']:.1f} times as much",
        "depth": claim("So the tokens grow more slowly with depth", tokens["v2"] < tokens["v1"]),
        "range": f"Going from window 8 to 16, the range of this input grows by {100 * logs:.0f} % "
                 f"instead of {100 * linear:.0f} %",
        "new entries of a table": claim(
            "a change from windows of 8 x 8 to windows of 16 x 16 patches enlarges the table from "
            f"{entries[0]} to {entries[1]} entries, and most of them are untrained",
            entries[1] - entries[0] > entries[1] / 2,
        ),
        "weights of the small network": f"{mlp:,} weights for three heads, for any window",
    }  # fmt: skip


def numbers() -> dict[str, str]:
    found = comparisons.configurations(read_runs(ROOT / "results" / "official").runs)
    return (windows_said() | stages_said() | cost_said() | card_said() | second_said()
            | records_said(found) | pets_said(found))  # fmt: skip


def draw() -> None:
    """The figure: windows, shifted windows, rolled windows with their mask, and the cost."""
    import matplotlib.pyplot as plt

    figure, (first, second, third, left, right) = plt.subplots(
        1, 5, figsize=(15, 3.3), width_ratios=(1, 1, 1, 1.5, 1.5), layout="constrained"
    )
    draw_windows(first, second, third)
    pixels = list(range(224, 1025, 8))
    patches = [(n / PATCH) ** 2 for n in pixels]
    lines = {
        "global: $4hwC^2 + 2(hw)^2C$": [all_pairs(n, C) for n in patches],
        "windows: $4hwC^2 + 2M^2hwC$": [in_windows(n, C, M) for n in patches],
    }
    dots = list(zip(*(one_layer(n) for n in SIZES), strict=True))
    for (label, line), dot in zip(lines.items(), dots, strict=True):
        color = COLORS["ViT" if label.startswith("global") else "Swin"]
        left.plot(pixels, [n / 1e9 for n in line], label=label, color=color)
        left.plot(SIZES, [n / 1e9 for n in dot], "ko", markersize=3)
    left.plot([], [], "ko", markersize=3, label="counted in timm's models")
    left.set(title="One layer: global attention\ngrows quadratically (C = 96, M = 7)", yscale="log")
    for label, name in NAMES.items():
        right.plot(SIZES, [whole(name, n) / 1e9 for n in SIZES], "o-", label=label, markersize=4,
                   color=COLORS[label[:3] if label[:3] == "ViT" else "Swin"])  # fmt: skip
    right.set(title="Whole models: Swin is cheaper\nonly on large images")
    for axes in (left, right):
        axes.set(xlabel="side of the image (pixels)", ylabel="multiply-adds (G)", xticks=SIZES)
        axes.tick_params(axis="x", labelsize=8)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "swin_vs_vit.png", dpi=130)


def draw_windows(first, second, third) -> None:
    """An 8 x 8 grid in windows of 4 x 4: which patches exchange information in a block."""
    line = torch.arange(8)
    regular = (line // 4)[:, None] * 2 + line // 4
    pieces = ((line + 2) // 4)[:, None] * 3 + (line + 2) // 4
    rolled = pieces.roll((-2, -2), (0, 1))
    panels = ((first, regular, "Windows: information\nstays inside"),
              (second, pieces, "Shifted by 2: new windows\nconnect the old ones"),
              (third, rolled, "Rolled: 4 full windows,\ncolors masked from each other"),
              )  # fmt: skip
    for axes, group, title in panels:
        axes.imshow(group, cmap="tab10", vmin=0, vmax=9, alpha=0.55)
        axes.set(title=title, xticks=range(8), yticks=range(8), xlabel="column of patches",
                 xticklabels=range(1, 9), yticklabels=range(1, 9))  # fmt: skip
        axes.title.set_fontsize(10)
        for edge in range(9):
            axes.axhline(edge - 0.5, color="white", linewidth=0.7)
            axes.axvline(edge - 0.5, color="white", linewidth=0.7)
        borders = (2, 6) if axes is second else (4,)
        for edge in borders:
            axes.axhline(edge - 0.5, color="black", linewidth=2)
            axes.axvline(edge - 0.5, color="black", linewidth=2)
    first.set_ylabel("row of patches")
    for axes, place in ((first, (3, 3)), (second, (3, 3)), (third, (1, 1))):
        axes.plot(*place, "k*", markersize=9)  # the patch in row 4, column 4


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers(), SOURCES)
