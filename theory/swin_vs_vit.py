"""Windows instead of all pairs: the numbers in swin_vs_vit.md.

python theory/swin_vs_vit.py                       # prints the steps, and fails if the text differs
python theory/swin_vs_vit.py --draw                # draws swin_vs_vit.png too
"""

import math
import sys

import timm
import torch
from _text import ROOT, check
from timm.models.swin_transformer import SwinTransformerBlock, WindowAttention
from timm.models.swin_transformer_v2 import SwinTransformerV2Block
from timm.models.swin_transformer_v2 import WindowAttention as WindowAttentionV2
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

C, M, PATCH = 96, 7, 4  # Swin-T's first stage: channels, patches along a window, pixels of a patch
SIZES = (224, 448, 672, 896, 1024)  # pixels
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
    swin = timm.create_model("swin_tiny_patch4_window7_224", img_size=size)
    plain = VisionTransformer(size, PATCH, embed_dim=C, depth=1, num_heads=3, class_token=False,
                              global_pool="avg")  # fmt: skip
    windows = counts(swin, size)["SwinTransformer.layers.0.blocks.0.attn"]
    return counts(plain, size)["VisionTransformer.blocks.0.attn"], windows


def whole(name: str, size: int) -> int:
    """Counted: a whole model of timm's."""
    return counts(timm.create_model(name, img_size=size), size)["Global"]


def cost_said() -> dict[str, str]:
    said, both = {}, {}
    for size in (224, 896, 1024):
        patches = (size // PATCH) ** 2
        padded = (math.ceil(size / PATCH / M) * M) ** 2  # windows that stick out are filled up
        both[size] = one_layer(size)
        assert both[size] == (all_pairs(patches, C), in_windows(padded, C, M))
        ratio = both[size][0] / both[size][1]
        said[f"one layer at {size} pixels"] = (
            f"| {size} | {patches:,} | {both[size][0] / 1e6:,.0f}M | {both[size][1] / 1e6:,.0f}M "
            f"| {ratio:.0f} |"
        )
    growth = [new / old for new, old in zip(both[896], both[224], strict=True)]
    said["16 times as many patches"] = f"{growth[1]:.0f} times with windows, {growth[0]:.0f} times"
    held = [
        sum(p.numel() for p in timm.create_model(name).parameters()) / 1e6
        for name in NAMES.values()
    ]
    said["parameters"] = f"{held[0]:.0f} and {held[1]:.0f} million parameters"
    for size in (224, 896):
        small, swin = (whole(name, size) for name in NAMES.values())
        said[f"whole models at {size}"] = (
            f"at {size} pixels {small / 1e9:.1f}G against {swin / 1e9:.1f}G"
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
    return {
        "one block": f"sees {seen[0]} patches",
        "a second, shifted": f"after a shifted block all {seen[1]}",
        "a second, not shifted": f"after a second one without shift still {seen[2]}",
        "pieces": f"3 x 3 = {regions} pieces",
        "windows": f"stay {shifted.shape[0]} windows",
        "relative positions": f"{(M * M) ** 2:,} pairs of a 7 x 7 window have only "
                              f"(2 x 7 - 1)^2 = {(2 * M - 1) ** 2} different offsets",
    }  # fmt: skip


@torch.no_grad()
def stages_said() -> dict[str, str]:
    swin = timm.create_model("swin_tiny_patch4_window7_224").to("meta")
    maps = swin.forward_intermediates(torch.zeros(1, 3, 224, 224, device="meta"),
                                      intermediates_only=True)  # fmt: skip
    shapes = [f"{m.shape[2]} x {m.shape[3]} x {m.shape[1]}" for m in maps]
    merge = swin.layers[1].downsample.reduction
    assert merge.in_features == 4 * C
    return {
        "the maps": ", ".join(shapes),
        "merging": f"{merge.in_features} numbers, mapped to {merge.out_features}",
    }


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

    branches = {}
    for name, kind in (("v1", SwinTransformerBlock), ("v2", SwinTransformerV2Block)):
        block = kind(96, (7, 7), 3, window_size=7).double().eval()
        x = torch.randn(1, 7, 7, 96).double()
        before = block(x) - x
        for last in (block.attn.proj, block.mlp.fc2):
            last.weight *= 10
            last.bias *= 10
        branches[name] = ((block(x) - x).norm() / before.norm()).item()
    small = WindowAttentionV2(96, (8, 8), 3)
    wide = WindowAttentionV2(96, (16, 16), 3, pretrained_window_size=(8, 8))
    inner = wide.relative_coords_table[:, 8:-8, 8:-8]
    assert torch.allclose(inner, small.relative_coords_table)
    mlp = sum(p.numel() for p in wide.cpb_mlp.parameters())
    assert mlp == sum(p.numel() for p in small.cpb_mlp.parameters())
    linear, logs = (15 - 7) / 7, (math.log(16) - math.log(8)) / math.log(8)
    edge = small.relative_coords_table.max(), wide.relative_coords_table.max()
    return {
        "v1, q and k 10 times larger": f"from {plain:.2f} to {large:.2f}",
        "v2, q and k 10 times larger": "changes nothing (below 1e-9)",
        "a branch, 10 times larger": f"{branches['v1']:.0f} times as much in v1 and "
                                     f"{branches['v2']:.1f} times in v2",
        "linear": f"(15 - 7) / 7 = {linear:.2f}",
        "in logarithms": f"(ln 16 - ln 8) / ln 8 = {logs:.2f}",
        "in timm's code": f"from {edge[0]:.2f} to {edge[1]:.2f}, {edge[1] / edge[0] - 1:.2f} more",
        "new entries of a table": f"from {15**2} to {31**2} entries",
        "weights of the small network": f"{mlp:,} weights",
    }  # fmt: skip


def numbers() -> dict[str, str]:
    return windows_said() | stages_said() | cost_said() | second_said()


def draw() -> None:
    """The picture: one layer by both formulas with what was counted, and whole models."""
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10.5, 3.9), layout="constrained")
    pixels = list(range(224, 1025, 8))
    patches = [(n / PATCH) ** 2 for n in pixels]
    lines = {
        "all pairs: $4hwC^2 + 2(hw)^2C$": [all_pairs(n, C) for n in patches],
        "windows: $4hwC^2 + 2M^2hwC$": [in_windows(n, C, M) for n in patches],
    }
    dots = list(zip(*(one_layer(n) for n in SIZES), strict=True))
    for (label, line), dot in zip(lines.items(), dots, strict=True):
        left.plot(pixels, [n / 1e9 for n in line], label=label)
        left.plot(SIZES, [n / 1e9 for n in dot], "ko", markersize=4)
    left.plot([], [], "ko", markersize=4, label="counted in timm's models")
    left.set(title="attention of one layer: patches of 4, C = 96, M = 7", yscale="log")
    for label, name in NAMES.items():
        right.plot(SIZES, [whole(name, n) / 1e9 for n in SIZES], "o-", label=label)
    right.set(title="whole models, counted")
    for axes in (left, right):
        axes.set(xlabel="side of the image, pixels", ylabel="G multiply-adds", xticks=SIZES)
        axes.legend()
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "swin_vs_vit.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers())
