"""Inside a ViT block: the numbers in vit_block.md.

python theory/vit_block.py                         # prints the steps, and fails if the text differs
python theory/vit_block.py --draw                  # draws vit_block.png too
"""

import math
import sys

import torch
import torch.nn.functional as F
from _text import ROOT, check, claim
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from lab.report import Record, comparisons, read_runs, sentences
from model import MLP, Attention, Block, VisionTransformer, ViTConfig

SOURCES = {  # the example, definitions, and results of others
    r"where $\Phi$ is the cumulative distribution function of the standard normal distribution":
        "Hendrycks and Gimpel 2016",
    "The ViT paper compares three kinds: **learned 1-D**": "Dosovitskiy et al. 2021, appendix D.4",
    "**2-D** (one vector": "Dosovitskiy et al. 2021, appendix D.4",
    "5-shot accuracy is 61.4 % without positions, 64.2 % with 1-D, 64.0 % with 2-D and 64.0 % with "
    "relative ones": "Dosovitskiy et al. 2021, table 8",
    "pretrained on ImageNet-21k, ViT-B/16 reaches 84.0 % on ImageNet and ViT-B/32 81.3 %":
        "Dosovitskiy et al. 2021, table 5",
    "On mnist-5k with patches of 7 pixels": "the name of the run",
    "branches are about equally large, so each norm divides the residual path by about "
    r"$\sqrt 2$": "the variance of a sum",
    "MNIST digits are centered": "LeCun et al. 1998",
    "the gradients of the last blocks are large at the start, at any depth, so training diverges "
    "without a careful warm-up; with pre-norm they shrink as the model gets deeper":
        "Xiong et al. 2020",
    "We did not run patch 2 (197 tokens). We chose a batch size of 16 instead of 64, which the "
    "recipe used at that time, after a trial run with patch 4 did worse at 64":
        "how the runs were chosen",
}  # fmt: skip
COLOR = "#c2571a"
DEPTH, DEPTHS = 12, (3, 6, 12, 24, 48)  # blocks


def example() -> dict[str, str]:
    x = torch.tensor([3.0, 1.0]).double()
    normed = F.layer_norm(x, (2,), eps=0)
    hidden = normed @ torch.tensor([[1.0, 0, 2, 0], [0, 1, 0, 2]]).double()
    active = F.gelu(hidden)
    assert torch.allclose(active, hidden * (1 + torch.erf(hidden / 2**0.5)) / 2)
    branch = active @ torch.tensor([[1.0, 0], [1, 0], [0, 1], [0, 1]]).double()
    slope = torch.func.grad(F.gelu)(torch.tensor(-0.5)).item()

    def row(values: Tensor) -> str:
        return "(" + ", ".join(f"{v:.2f}" for v in values) + ")"

    def whole(values: Tensor) -> str:
        return "(" + ", ".join(f"{v:.0f}" for v in values) + ")"

    return {
        "LayerNorm": f"token is $x = {whole(x)}$. **LayerNorm** gives ${whole(normed)}$",
        "wider": f"widens it to four numbers, here ${whole(hidden)}$",
        "GELU": f"**GELU** turns these into {row(active)}",
        "branch": f"gives {row(branch)}",
        "block": f"the output is {row(x + branch)}",
        "slope": f"at -0.5 the slope of GELU is {slope:.2f} and that of ReLU is 0",
    }


def macs(layer: nn.Module, tokens: int, dim: int) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        x = torch.zeros(1, tokens, dim, device="meta")
        layer(x, return_weights=True) if isinstance(layer, Attention) else layer(x)
    return counter.get_total_flops() // 2


def cost_said() -> dict[str, str]:
    n, dim = 197, 768
    with torch.device("meta"):
        attention, mlp, block = (kind(ViTConfig()) for kind in (Attention, MLP, Block))
    by_formula = [
        (macs(attention, tokens, dim), macs(mlp, tokens, dim))
        == (4 * tokens * dim**2 + 2 * tokens**2 * dim, 8 * tokens * dim**2)
        for tokens in (n, 50)
    ]
    costs = macs(attention, n, dim), macs(mlp, n, dim)
    equal = next(m for m in range(1, 9999) if 2 * m**2 * dim >= 12 * m * dim**2)
    sizes = [sum(p.numel() for p in part.parameters()) for part in (mlp, block)]
    return {
        "width": f"D to {mlp.fc1.out_features // dim}D and back",
        "formulas": claim("attention $4 N D^2 + 2 N^2 D$, MLP $8 N D^2$", *by_formula),
        "parameters": f"holds {100 * sizes[0] / sizes[1]:.1f} % of the parameters",
        "costs": f"For ViT-B at N = {n} and D = {dim}, attention takes "
                 f"{100 * costs[0] / sum(costs):.1f} % and the MLP "
                 f"{100 * costs[1] / sum(costs):.1f} %",
        "quadratic": "quadratic part, $2 N^2 D$, is only "
                     f"{100 * 2 * n**2 * dim / sum(costs):.1f} % of the block",
        "equal": f"at $N = 6 D$ = {equal:,} tokens, an image of {16 * math.sqrt(equal):,.0f} "
                 "pixels with patches of 16",
    }  # fmt: skip


class PostNorm(Block):
    """The same block with the norm after each addition."""

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.attn(x))
        return self.norm2(x + self.mlp(x))


class NoResidual(Block):
    """The same block without residual connections."""

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.norm2(self.attn(self.norm1(x))))


def stack(kind: type[Block], depth: int, seed: int = 0) -> nn.Sequential:
    """Random blocks with Xavier weights, which keep the size of a signal."""
    torch.manual_seed(seed)
    blocks = nn.Sequential(*(kind(ViTConfig(embed_dim=64, num_heads=4)) for _ in range(depth)))
    for module in blocks.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
    return blocks


def last_gradient(kind: type[Block], depth: int) -> float:
    """The gradient norm of the last block's first MLP weight, at random weights; five seeds."""
    norms = []
    for seed in range(5):
        blocks, head = stack(kind, depth, seed), nn.Linear(64, 10)
        x, y = torch.randn(16, 50, 64), torch.arange(16) % 10
        with torch.no_grad():  # only the last block needs a gradient
            x = blocks[:-1](x)
        x = blocks[-1](x)[:, 0]
        if kind is Block:  # the final norm that pre-norm needs
            x = F.layer_norm(x, (64,))
        F.cross_entropy(head(x), y).backward()
        norms.append(blocks[-1].mlp.fc1.weight.grad.norm().item())
    return sum(norms) / len(norms)


@torch.no_grad()
def likeness(kind: type[Block]) -> float:
    """The mean cosine between different tokens after all blocks."""
    x = F.normalize(stack(kind, DEPTH)(torch.randn(4, 50, 64)), dim=-1)
    cosines = x @ x.mT
    return ((cosines.sum((1, 2)) - 50) / (50 * 49)).mean().item()


def norms_said() -> dict[str, str]:
    few, many = DEPTHS[0], DEPTHS[-1]
    pre, post = (last_gradient(kind, few) / last_gradient(kind, many) for kind in (Block, PostNorm))
    without, with_residual = likeness(NoResidual), likeness(Block)
    with torch.device("meta"):
        model = VisionTransformer(ViTConfig())
    return {
        "identity path": f"Twelve blocks with two norms each divide it by $2^{{{DEPTH}}}$ = "
                         f"{2**DEPTH:,}",
        "final norm": claim(
            "needs a final norm after all blocks", isinstance(model.norm, nn.LayerNorm)
        ),
        "gradients": claim(
            f"from {few} to {many} blocks, the gradient in the last block shrinks by a factor of "
            f"{pre:.1f} with pre-norm and of {post:.1f} with post-norm",
            pre > 3, post < 1.5,
        ),
        "likeness": claim(
            f"After {DEPTH} random blocks the mean cosine similarity between tokens is "
            f"{without:.2f} without residual connections and {with_residual:.2f} with them",
            without > with_residual,
        ),
    }  # fmt: skip


def runs() -> dict[str, Record]:
    """Short runs on mnist-5k by patch size, by folder name without dataset and seed."""
    found = [r for r in read_runs(ROOT / "theory" / "patch_size").runs if r.metrics]
    return {r.folder.name.removeprefix("mnist-5k-").removesuffix("-s0"): r for r in found}


def by_patch() -> list[Record]:
    picked = [r for name, r in runs().items() if name.removeprefix("patch").isdigit()]
    return sorted(picked, key=lambda r: r.constants["PATCH_SIZE"])


def result(run: Record) -> str:
    return sentences.result(comparisons.Configuration([run]))


def patches_said() -> dict[str, str]:
    said, records, commands = {}, by_patch(), set()
    for run in records:
        c = run.constants
        assert c["DATASET"] == "mnist-5k"
        commands.add(
            f"`python train.py --dataset {c['DATASET']} --patch-size P --epochs {c['EPOCHS']} "
            f"--batch-size {c['BATCH_SIZE']} --learning-rate {c['LEARNING_RATE']:g} "
            f"--seed {c['SEED']}`"
        )
        patch, macs = c["PATCH_SIZE"], run.config["model"]["macs"]
        tokens = (28 // patch) ** 2 + 1
        said[f"patch {patch}"] = (
            f"| {patch} | {tokens} | {macs / 1e6:.1f}M "
            f"| {sentences.percent(run.history[-1]['train_accuracy'])} | {result(run)} |"
        )
    named = {r.constants["PATCH_SIZE"]: r for r in records}
    best = max(records, key=lambda r: r.metrics["test_accuracy"])
    (said["command"],) = commands
    small, middle, single = (named[p].metrics["test_accuracy_95"] for p in (4, 7, 28))
    trained = [named[p].history[-1]["train_accuracy"] for p in named if p < 28]
    cost = {p: run.config["model"]["macs"] for p, run in named.items()}
    growth = named[4].config["model"]["macs"] / named[14].config["model"]["macs"]
    pooled, token = runs()["patch7-avg"], named[7]
    ranges = [r.metrics["test_accuracy_95"] for r in (pooled, token)]
    images = best.config["dataset"]
    return said | {
        "test images": f"{images['test']:,} test images of 28 x 28 pixels",
        "training images": f"from {images['train']:,} images which patches belong together",
        "cost": f"From patch 14 to patch 4, the cost grows by a factor of {growth:.1f}",
        "figure": claim(
            "patch 14 costs less than patch 4 and is more accurate",
            cost[14] < cost[4],
            best.metrics["test_accuracy_95"][0] > small[1],
        ),
        "best": claim(
            "Here patch 14 is the best. Its interval does not overlap that of patch 4, but it "
            "overlaps that of patch 7",
            best is named[14],
            best.metrics["test_accuracy_95"][0] > small[1],
            best.metrics["test_accuracy_95"][0] <= middle[1],
        ),
        "one patch": claim(
            "Patch 28, for which attention only has to copy one patch into the class token, is "
            "not better than patch 4 (the intervals overlap)",
            small[0] <= single[1], single[0] <= small[1],
            named[28].metrics["test_accuracy"] < named[4].metrics["test_accuracy"],
        ),
        "undertrained": claim(
            "From patch 14 down to patch 4, *training* accuracy falls as well",
            trained == sorted(trained), trained[0] < trained[-1],
        ),
        "pooling": claim(
            f"we get {result(token)} with the class token and {result(pooled)} with mean pooling: "
            "the intervals overlap",
            ranges[0][0] <= ranges[1][1], ranges[1][0] <= ranges[0][1],
        ),
    }  # fmt: skip


def draw() -> None:
    """The figure: both blocks, gradients by depth, accuracy and cost by patch size."""
    import matplotlib.pyplot as plt

    figure, (blocks, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.9), width_ratios=(1.1, 1, 1.2), layout="constrained"
    )
    blocks.set(xlim=(0, 10), ylim=(-0.6, 10.6), title="Pre-norm leaves the residual path free")
    blocks.axis("off")
    orders = {"pre-norm": ("norm", "attention", "+", "norm", "MLP", "+"),
              "post-norm": ("attention", "+", "norm", "MLP", "+", "norm")}  # fmt: skip
    for left, (name, parts) in zip((1.6, 6.6), orders.items(), strict=True):
        blocks.text(left, 10.2, name, ha="center", weight="bold")
        blocks.annotate("", (left, 9.6), (left, -0.4), arrowprops={"arrowstyle": "->"})
        for row, part in enumerate(parts):
            y = 0.9 + 1.5 * row
            color = {"norm": "#dddddd", "+": "white"}.get(part, "#f3c9a8")
            blocks.text(left, y, part, ha="center", va="center", fontsize=9,
                        bbox={"boxstyle": "round", "facecolor": color})  # fmt: skip
            if part == "+":
                start = y - (3.5 if name == "pre-norm" else 2.0)
                blocks.plot([left, left + 2, left + 2], [start, start, y], color=COLOR)
                blocks.annotate("", (left + 0.4, y), (left + 2, y),
                                arrowprops={"arrowstyle": "->", "color": COLOR})  # fmt: skip
    for kind, label, color in ((Block, "pre-norm", COLOR), (PostNorm, "post-norm", "gray")):
        middle.plot(DEPTHS, [last_gradient(kind, depth) for depth in DEPTHS], "o-", label=label,
                    color=color)  # fmt: skip
    middle.set(title="In deeper models, the last gradient\nshrinks only with pre-norm",
               xlabel="blocks (random weights, five seeds)",
               ylabel="gradient norm of the last block",
               xscale="log", ylim=0)  # fmt: skip
    middle.set_xticks(DEPTHS, [str(depth) for depth in DEPTHS])
    middle.minorticks_off()
    middle.legend()
    records = by_patch()
    costs = [r.config["model"]["macs"] / 1e6 for r in records]
    means = [100 * r.metrics["test_accuracy"] for r in records]
    errors = [[abs(100 * r.metrics["test_accuracy_95"][end] - mean) for r, mean in
               zip(records, means, strict=True)] for end in (0, 1)]  # fmt: skip
    right.errorbar(costs, means, errors, fmt="o-", color=COLOR, capsize=3)
    for run, cost, mean in zip(records, costs, means, strict=True):
        right.annotate(f"patch {run.constants['PATCH_SIZE']}", (cost, mean), xytext=(6, 6),
                       textcoords="offset points", fontsize=9)  # fmt: skip
    right.set(title="After 10 epochs, patch 14 beats patch 4\nat a tenth of the cost (mnist-5k)",
              xscale="log", xlabel="multiply-adds per image (M)",
              ylabel="test accuracy (%), 95 % interval")  # fmt: skip
    for axes in (middle, right):
        axes.grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "vit_block.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, example() | cost_said() | norms_said() | patches_said(), SOURCES)
