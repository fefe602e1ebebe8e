"""A convolution, an LSTM and attention on the same sequence: the numbers in cnn_rnn_transformer.md.

python theory/cnn_rnn_transformer.py               # prints the steps, and fails if the text differs
python theory/cnn_rnn_transformer.py --draw        # draws cnn_rnn_transformer.png too

All layers take and give N tokens of D numbers, (B, N, D), and have kernel K where they have one.
"""

import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from _text import ROOT, check, claim
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from model import Attention, ViTConfig

SOURCES = {  # definitions and results of others
    "step t waits for step t - 1": "definition",
    "$N D$ and $h N^2$; $N D$ if fused": "shapes of the tensors",
    "large ViTs worse than ResNets after pretraining on ImageNet and better after pretraining on "
    "300 million images": "Dosovitskiy et al. 2021, figure 3",
}
TOKENS = 16  # of the worked example
K = 3  # tokens that a convolution reads, itself among them
PRODUCTS = ("AddmmBackward0", "MmBackward0", "BmmBackward0", "ConvolutionBackward0")


class Convolution(nn.Module):
    """K neighboring tokens to one, the same weights everywhere."""

    def __init__(self, dim: int):
        super().__init__()
        self.conv = nn.Conv1d(dim, dim, K, padding=K // 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x.mT).mT


class Recurrence(nn.Module):
    """An LSTM, token after token, written with torch's cell (which has a forget gate)."""

    def __init__(self, dim: int):
        super().__init__()
        self.cell = nn.LSTMCell(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        state, out = None, []
        for token in x.unbind(1):
            state = self.cell(token, state)
            out.append(state[0])
        return torch.stack(out, dim=1)


def attention(dim: int) -> Attention:
    return Attention(ViTConfig(embed_dim=dim, num_heads=4))


LAYERS: dict[str, Callable[[int], nn.Module]] = {
    "convolution": Convolution, "LSTM": Recurrence, "attention": attention
}  # fmt: skip


def macs(layer: nn.Module, *shape: int) -> int:
    """Multiply-adds of a forward pass, counted by torch."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        layer(torch.zeros(1, *shape))
    return counter.get_total_flops() // 2


def formula(name: str, n: int, dim: int) -> int:
    """Multiply-adds of a layer according to the text."""
    return {
        "convolution": K * n * dim**2,
        "LSTM": 8 * n * dim**2,
        "attention": 4 * n * dim**2 + 2 * n**2 * dim,
    }[name]


def chain(layer: nn.Module, n: int, dim: int) -> int:
    """Matrix products on the longest path through a layer: each waits for the one before."""
    with sdpa_kernel(SDPBackend.MATH):
        end = layer(torch.zeros(1, n, dim)).sum().grad_fn
    longest, waiting = {}, [end]
    while waiting:  # depth first, without recursion
        node = waiting[-1]
        before = [child for child, _ in node.next_functions if child is not None]
        if left := [child for child in before if child not in longest]:
            waiting += left
            continue
        waiting.pop()
        longest[node] = (node.name() in PRODUCTS) + max((longest[c] for c in before), default=0)
    return longest[end]


def reaches(layers: nn.Module, n: int, dim: int) -> bool:
    """Whether the last token's output depends on the first token."""
    x = torch.randn(1, n, dim, requires_grad=True)
    layers(x)[0, -1].sum().backward()
    return x.grad[0, 0].abs().sum().item() > 0


def layers_needed(name: str, n: int, dim: int = 8) -> int:
    """Number of layers until the output of the last token depends on the first token."""
    stack = nn.Sequential()
    while not len(stack) or not reaches(stack, n, dim):
        stack.append(LAYERS[name](dim))
    return len(stack)


def counted() -> dict[str, str]:
    said, n, dim = {}, 64, 32
    ratios, weights, chains, matrices = [], [], [], []
    for name, make in LAYERS.items():
        for size in (n, 2 * n, 8 * n):
            assert macs(make(dim), size, dim) == formula(name, size, dim)
        ratio = formula(name, 8 * n, dim) / formula(name, n, dim)
        ratios.append(f"{ratio:.1f}")
        weights.append(f"{name} {sum(p.numel() for p in make(dim).parameters()):,}")
        matrices.append(sum(p.numel() for p in make(dim).parameters() if p.ndim > 1) // dim**2)
        depths = [chain(make(dim), size, dim) for size in (TOKENS, n)]
        chains.append(f"{name} {depths[0]} and {depths[1]}")
    said["8 times as many tokens"] = (
        f"With D = {dim}, going from {n} to {8 * n} tokens multiplies the cost of the "
        f"convolution by {ratios[0]}, of the LSTM by {ratios[1]} and of attention by {ratios[2]}."
    )
    per_token = [[formula(name, size, dim) / size for size in (n, 8 * n)] for name in LAYERS]
    said["formulas"] = claim(  # compared with the counts above
        "| $K N D^2$ | $8 N D^2$ | $4 N D^2 + 2 N^2 D$ |", matrices[0] == K
    )
    said["weight matrices"] = claim("| $K D^2$ | $8 D^2$ | $4 D^2$ |", matrices == [K, 8, 4])
    said["only attention"] = claim(
        "only attention costs more per token as the sequence grows",
        [long > short for short, long in per_token] == [False, False, True],
    )
    quadratic = [2 * m**2 * dim / formula("attention", m, dim) for m in (dim // 8, 8 * dim)]
    said["when"] = claim(
        "But $N^2$ matters only when N is large compared with D",
        quadratic[0] < 0.1, quadratic[1] > 0.5,
    )  # fmt: skip
    said["parameters"] = f"at D = {dim}: {', '.join(weights)}, for any N"
    said["dependent products"] = f"a layer of {TOKENS} and of {n} tokens is: {', '.join(chains)}"
    said |= example()
    deep = layers_needed("convolution", TOKENS)
    said["path"] = claim(
        "about 2N / (K - 1) layers | N - 1 steps in one layer",
        abs(2 * TOKENS / (K - 1) - deep) <= 1, layers_needed("LSTM", TOKENS) == 1,
    )  # fmt: skip
    said["convolutions from first to last"] = (
        f"takes {deep} layers: after {deep - 1} the gradient is still exactly 0"
    )
    said["an RNN"] = f"passes the information through {TOKENS - 1} updates"
    dilated = nn.Sequential(*(nn.Conv1d(8, 8, 3, padding=2**i, dilation=2**i) for i in range(4)))
    x = torch.randn(1, 8, TOKENS, requires_grad=True)
    dilated[:3](x)[0, :, -1].sum().backward()
    assert x.grad[0, :, 0].abs().sum() == 0
    dilated(x)[0, :, -1].sum().backward()
    assert x.grad[0, :, 0].abs().sum() > 0
    said["dilated"] = f"(**dilated** convolution) {len(dilated)} layers are enough"

    return said | images_said()


def example() -> dict[str, str]:
    direct = layers_needed("attention", TOKENS) == 1
    return {
        "title": f"## A worked example: {TOKENS} tokens in a row",
        "task": f"Token {TOKENS} needs something that token 1 knows",
        "kernel": f"kernel of K = {K} tokens",
        "directly": claim(f"one layer and one step: token {TOKENS} reads token 1 directly", direct),
        "global": claim("global context from the first layer", direct),
    }


def images_said() -> dict[str, str]:
    """A convolution of 3 x 3 on a grid of 14 x 14, and a ViT-B's attention on its 196 tokens."""
    said = {}
    conv, attend = 9 * 196 * 768**2, formula("attention", 196, 768)
    assert conv == macs(nn.Conv2d(64, 64, 3, padding=1), 64, 14, 14) * 144
    assert conv > attend
    said["on an image"] = (
        f"For the 196 patches of a ViT-B/16, the 3 x 3 convolution needs {conv / 1e6:,.0f}M "
        f"multiply-adds and attention needs {attend / 1e6:,.0f}M"
    )
    attend_at = {m: formula("attention", m, 768) for m in range(1, 4000)}
    equal = next(m for m, cost in attend_at.items() if cost >= formula("LSTM", m, 768))
    said["equal to an LSTM"] = (
        f"At D = 768, attention costs as much as an LSTM at N = 2D = {equal:,} tokens"
    )
    larger = next(m for m, cost in attend_at.items() if cost >= 9 * m * 768**2)
    assert (equal, larger) == (2 * 768, 2.5 * 768)
    said["equal to a 3 x 3 convolution"] = (
        f"as much as a 3 x 3 convolution at N = 2.5D = {larger:,}"
    )
    said["attention weights"] = (
        f"12 x 197 x 197 = {12 * 197**2:,} attention weights per image, "
        f"{12 * 197**2 / (197 * 768):.1f} times as many numbers as its tokens"
    )
    return said


def behavior() -> dict[str, str]:
    """Order, length, streams: what each layer does with a changed sequence."""
    torch.manual_seed(0)
    n, dim = 16, 32
    x, order = torch.randn(1, n, dim).double(), torch.randperm(n)
    shifted = F.pad(x, (0, 0, 4, 0))[:, :n]  # four zeros in front, the last four tokens gone
    changes = []
    for name, make in LAYERS.items():
        layer = make(dim).double()
        with torch.no_grad():
            y = layer(x)
            gap = ((layer(x[:, order]) - y[:, order]).norm() / y.norm()).item()
            moved = layer(shifted)[:, 6:14] - y[:, 2:10]  # away from the borders
            drift = (moved.norm() / y[:, 2:10].norm()).item()
            assert layer(torch.randn(1, 3 * n, dim).double()).shape == (1, 3 * n, dim)
        changes.append(f"{name} {gap:.2f}" if gap > 1e-12 else f"{name} 0.")
        assert (drift < 1e-12) == (name == "convolution")
    said = {"in another order": f"the relative change: {', '.join(changes)}"}
    return said | faded() | streamed()


def faded() -> dict[str, str]:
    """How much the gradient of the last output shrinks over 50 tokens; mean over five seeds."""
    falls = {"LSTM": 0.0, "attention": 0.0}
    for name in falls:
        for seed in range(5):
            torch.manual_seed(seed)
            x = torch.randn(1, 64, 32).double().requires_grad_()
            LAYERS[name](32).double()(x)[0, -1].sum().backward()
            size = x.grad[0].norm(dim=1)
            falls[name] += (size[-2] / size[-52]).log10().item() / 5
    return {
        "the gradient of an LSTM": claim(
            "From the last output of an untrained LSTM to 50 tokens earlier, the gradient shrinks "
            f"by a factor of about 10^{falls['LSTM']:.0f}; with attention it does not shrink",
            falls["LSTM"] > 1, abs(falls["attention"]) < 0.1,
        )
    }  # fmt: skip


@torch.no_grad()
def streamed() -> dict[str, str]:
    """Token by token: how many numbers must be kept so that nothing is computed twice."""
    torch.manual_seed(0)
    n, dim = 16, 32
    x = torch.randn(1, n, dim).double()

    layer = Recurrence(dim).double()
    torchs = nn.LSTM(dim, dim, batch_first=True).double()
    torchs.load_state_dict({f"{key}_l0": value for key, value in layer.cell.state_dict().items()})
    assert (torchs(x)[0] - layer(x)).abs().max() < 1e-12

    conv = nn.Conv1d(dim, dim, K).double()
    whole = conv(F.pad(x.mT, (K - 1, 0))).mT  # causal: a token sees itself and what was before
    kept, out = x.new_zeros(1, K - 1, dim), []
    for token in x.split(1, dim=1):
        window = torch.cat([kept, token], dim=1)
        out.append(conv(window.mT).mT)
        kept = window[:, 1:]
    assert (torch.cat(out, dim=1) - whole).abs().max() < 1e-12

    maps = nn.Linear(dim, 3 * dim).double()
    q, k, v = maps(x).chunk(3, dim=-1)
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    cache, out = [], []
    for token in x.split(1, dim=1):
        q, k, v = maps(token).chunk(3, dim=-1)
        cache.append((k, v))
        keys, values = (torch.cat(part, dim=1) for part in zip(*cache, strict=True))
        out.append(F.scaled_dot_product_attention(q, keys, values))
    assert (torch.cat(out, dim=1) - whole).abs().max() < 1e-12
    state = claim("| $(K - 1) D$ | $2 D$ | $2 N D$, growing |", kept.numel() == (K - 1) * dim,
                  sum(part.numel() for part in torchs(x)[1]) == 2 * dim,
                  keys.numel() + values.numel() == 2 * n * dim)  # fmt: skip
    dim, n = 768, 196
    return {
        "state": state,
        "streams": "gives the same output as all at once (within 1e-12)",
        "kept": f"For D = {dim} and {n} tokens the state holds $(K - 1) D$ = {(K - 1) * dim:,}, "
                f"$2 D$ = {2 * dim:,} and $2 N D$ = {2 * n * dim:,} numbers",
    }  # fmt: skip


def numbers() -> dict[str, str]:
    return counted() | behavior()


def influence(layer: nn.Module, n: int, dim: int) -> Tensor:
    """How much output i depends on input j, relative to the largest in row i, (N, N)."""
    x, rows = torch.randn(1, n, dim, requires_grad=True), []
    for i in range(n):
        (grad,) = torch.autograd.grad(layer(x)[0, i].sum(), x)
        rows.append(grad[0].norm(dim=1))
    found = torch.stack(rows)
    return found / found.amax(1, keepdim=True)


def draw() -> None:
    """The figure: which tokens each layer reads, and what a layer costs."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(
        1, 4, figsize=(12.5, 3.4), width_ratios=(1, 1, 1, 1.6), layout="constrained"
    )
    titles = ("Convolution reads\nits neighbors", "LSTM reads the past,\nrecent tokens most",
              "Attention reads\nall tokens")  # fmt: skip
    torch.manual_seed(0)
    for ax, make, title in zip(axes, LAYERS.values(), titles, strict=False):
        shown = ax.imshow(influence(make(32), 16, 32), cmap="Blues", vmin=0, vmax=1)
        ax.set(title=title, xlabel="input token", ylabel="output token")
        ax.set(xticks=[0, 5, 10, 15], yticks=[0, 5, 10, 15])
    figure.colorbar(shown, ax=axes[2], label="gradient (1: largest of row)")
    tokens = list(range(16, 4097, 16))
    lines = {
        "attention": ("attention", 1.0), "3 x 3 convolution": ("convolution", 3.0),
        "LSTM": ("LSTM", 1.0), "convolution, K = 3": ("convolution", 1.0),
    }  # fmt: skip
    for label, (name, factor) in lines.items():
        color = {"attention": "#c2571a", "LSTM": "#2a8a57"}.get(name, "#1f5fa8")
        axes[3].plot(tokens, [factor * formula(name, n, 768) / 1e9 for n in tokens], label=label,
                     color=color, linestyle="--" if label.endswith("3") else "-")  # fmt: skip
    axes[3].set(title="Only attention grows faster\nthan linearly (D = 768)",
                xlabel="tokens N", ylabel="multiply-adds of one layer (G)")  # fmt: skip
    axes[3].axvline(196, color="gray", linestyle=":", label="ViT-B/16 at 224 pixels")
    axes[3].legend(fontsize=9)
    axes[3].grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "cnn_rnn_transformer.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers(), SOURCES)
