"""Self-attention on four patches, as on paper: the numbers in attention_by_hand.md.

python theory/attention_by_hand.py                 # prints the steps, and fails if the text differs
python theory/attention_by_hand.py --draw          # draws attention_by_hand.png too
"""

import math
import re
import sys

import torch
from _text import ROOT, check, claim
from torch import Tensor

from model import Attention, ViTConfig

E = math.e
PATCHES = torch.tensor([[1, 2], [2, 0], [0, 1], [1, 1]], dtype=torch.float64)  # rows p_1 to p_4
W_Q = torch.eye(2, dtype=torch.float64)
W_K = torch.tensor([[1, 0], [0, 0]], dtype=torch.float64)
W_V = torch.tensor([[0, 0], [0, 1]], dtype=torch.float64)
SCALE = 2**-0.5
EXACT = {  # the second number of each output, as a formula; `evaluate` computes it
    1: (r"\frac{2e + 0 + 1 + e}{(1 + e)^2}", r"\frac{1 + 3e}{(1 + e)^2}"),
    2: (r"\frac{2e^2 + 0 + 1 + e^2}{(1 + e^2)^2}", r"\frac{1 + 3e^2}{(1 + e^2)^2}"),
    3: (r"\frac{2 + 0 + 1 + 1}{4}", "1"),
}
KEYS, WIDTH = 16, 64  # of the random queries and keys
SOURCES = {  # definitions
    "so steps 1 to 4 have none": "the numbers of the headings",
    "The division keeps the scores at variance 1": "the variance of a sum",
    r"divide the scores by $\sqrt d$, here by $\sqrt 2$": "Vaswani et al. 2017, section 3.2.1",
    "If q and k have d independent numbers of mean 0 and variance 1": "the variance of a sum",
    r"its $W_Q$ is $\sqrt 2$ times the identity": "checked by ours()",
}


def attend(scale: float = 1.0, over: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, weights and outputs; the softmax runs over the keys (1) or the queries (0)."""
    q, k, v = (PATCHES @ w.T for w in (W_Q, W_K, W_V))
    scores = q @ k.T * scale
    weights = scores.softmax(over)
    return scores, weights, weights @ v


def ours() -> Tensor:
    """The outputs of `Attention` in model.py with these weights."""
    layer = Attention(ViTConfig(embed_dim=2, num_heads=1, qkv_bias=False)).double()
    with torch.no_grad():
        # The layer divides by sqrt(2), which the sheet does not do; larger queries undo it.
        layer.qkv.weight.copy_(torch.cat([W_Q * math.sqrt(2), W_K, W_V]))
        layer.proj.weight.copy_(torch.eye(2))
        layer.proj.bias.zero_()
        return layer(PATCHES[None])[0]


def evaluate(formula: str) -> float:
    r"""The value of a formula such as \frac{1 + 3e}{(1 + e)^2}."""
    code = re.sub(r"\\frac\{(.+)\}\{(.+)\}", r"(\1) / (\2)", formula)
    return eval(re.sub(r"(\d)e", r"\1 * e", code).replace("^", "**"), {"e": E})


def matrix(rows: list[list[str]]) -> str:
    """A matrix in the notation of GitHub's formulas."""
    return r"\begin{pmatrix} " + r" \\ ".join(map(" & ".join, rows)) + r" \end{pmatrix}"


def written(rows: Tensor, digits: int = 0) -> str:
    """The numbers of a matrix, or of a vector as a column."""
    return matrix([[f"{x:.{digits}f}" for x in row] for row in rows.reshape(len(rows), -1)])


def row(values: Tensor, digits: int = 4) -> str:
    return ", ".join(f"{value:.{digits}f}" for value in values)


def given() -> dict[str, str]:
    """The task, and step 1."""
    said = {f"p_{i}": f"p_{i} = {written(patch)}" for i, patch in enumerate(PATCHES, 1)}
    first, any_patch = PATCHES[0], torch.tensor([3.0, 5.0]).double()
    said["example"] = "For patch 1"
    said["W"] = claim("$W_Q$ changes nothing, $W_K$ keeps the first number and $W_V$ the second",
                      (W_Q @ any_patch).tolist() == [3, 5], (W_K @ any_patch).tolist() == [3, 0],
                      (W_V @ any_patch).tolist() == [0, 5])  # fmt: skip
    for name, w in {"Q": W_Q, "K": W_K, "V": W_V}.items():
        said[f"W_{name}"] = f"W_{name} = {written(w)}"
        sums = [[rf"{a:.0f} \cdot {first[0]:.0f} + {b:.0f} \cdot {first[1]:.0f}"] for a, b in w]
        said[f"{name} of patch 1"] = f"W_{name} p_1 &= {matrix(sums)} = {written(w @ first)}"
    for i, patch in enumerate(PATCHES, 1):
        q, k, v = (row(w @ patch, 0) for w in (W_Q, W_K, W_V))
        said[f"q, k, v of p_{i}"] = f"| {i} | ({q}) | ({k}) | ({v}) |"
    return said


def steps() -> dict[str, str]:
    """Steps 2 to 4."""
    q, k, v = (PATCHES @ w.T for w in (W_Q, W_K, W_V))
    scores, weights, outputs = attend()
    assert torch.equal(scores[0], scores[3])
    assert scores[2].tolist() == [0] * 4
    for query, denominator in ((0, (1 + E) ** 2), (1, (1 + E**2) ** 2)):
        assert abs(scores[query].exp().sum() - denominator) < 1e-12
    products = " + ".join(rf"{a:.0f} \cdot {b:.0f}" for a, b in zip(q[0], k[1], strict=True))
    powers = " + ".join(f"e^{s:.0f}" for s in scores[0])
    said = {
        "a score": rf"For query 1 and key 2, $q_1 \cdot k_2 = {products} = {scores[0, 1]:.0f}$",
        "keys": claim("The second number of every key is 0, so each score is the product of two "
                      "first numbers", not k[:, 1].any()),
        "scores": f"S = {written(scores)}",
        "most": f"Query 1 attends most to patch {weights[0].argmax() + 1}",
        "a weight": rf"w_{{12}} = \frac{{e^{scores[0, 1]:.0f}}}{{{powers}}} = "
                    rf"\frac{{e^2}}{{(1 + e)^2}} = {weights[0, 1]:.4f}",
        "row 2": "In row 2 the denominator is $e^2 + e^4 + 1 + e^2 = (1 + e^2)^2$",
        "rows 3 and 4": "Row 3 has four equal scores, so each weight is 1/4. Row 4 equals row 1",
        "weights": f"A = {written(weights, 4)}",
        "values": claim("The first number of every value is 0, so it stays 0. The second numbers "
                        f"are {row(v[:, 1], 0)}", not v[:, 0].any()),
    }  # fmt: skip
    for i, formulas in EXACT.items():
        for formula in formulas:
            assert abs(outputs[i - 1, 1].item() - evaluate(formula)) < 1e-12
        decimal = f" = {outputs[i - 1, 1]:.4f}" if i < 3 else ""
        who = {1: "queries 1 and 4"}.get(i, f"query {i}")
        said[f"output {i}"] = rf"\text{{{who}}} &= {' = '.join(formulas)}{decimal}"
    assert torch.equal(outputs[0], outputs[3])
    assert outputs[2].tolist() == [0, 1]
    o1, o2, _, o4 = (f"(0, {o[1]:.4f})" for o in outputs)
    gap = (ours() - outputs).abs().max().item()
    return said | {
        "outputs": f"$o_1 = {o1}$, $o_2 = {o2}$, $o_3 = (0, 1)$ and $o_4 = {o4}$",
        "patch 2": claim(
            "Queries 1, 2 and 4 put most of their weight on patch 2, whose value is 0; their "
            "outputs are smaller than the mean of the second numbers, which is 1",
            *(weights[i].argmax() == 1 and weights[i, 1] > 0.5 for i in (0, 1, 3)),
            not v[1].any(),
            *(outputs[i, 1] < v[:, 1].mean() == 1 for i in (0, 1, 3)),
        ),
        "patch 3": claim("The first number of $q_3$ is 0, so patch 3 matches all keys equally",
                         q[2, 0] == 0),
        "model.py": claim("agrees within 1e-12", gap < 1e-12),
    }  # fmt: skip


def random_attention(dim: int, scale: float) -> tuple[float, float, float]:
    """Random queries and keys: deviation of the scores, mean largest weight, and its slope."""
    draw = torch.Generator().manual_seed(0)
    q, k = (torch.randn(4000, n, dim, generator=draw) for n in (1, KEYS))
    scores = (q @ k.mT).squeeze(1)
    largest = (scores * scale).softmax(-1).amax(-1)
    slope = largest * (1 - largest)  # derivative of a softmax output by its own score
    return scores.std().item(), largest.mean().item(), slope.mean().item()


def scaling() -> dict[str, str]:
    """What the division by sqrt(d) changes, in the task and for random numbers."""
    plain, scaled = attend()[1:], attend(SCALE)[1:]
    deviation, largest, slope = random_attention(WIDTH, 1)
    assert abs(deviation / WIDTH**0.5 - 1) < 0.02
    growing = [random_attention(d, 1)[1] for d in (2, 8, WIDTH)]
    _, largest_scaled, slope_scaled = random_attention(WIDTH, WIDTH**-0.5)
    return {
        "with 1/sqrt(d)": f"the second numbers of the outputs become {row(scaled[1][:, 1])}",
        "the largest weight": claim(
            f"The weights are more even: the largest falls from {plain[0].max():.4f} to "
            f"{scaled[0].max():.4f}",
            plain[0].max() > scaled[0].max(),
        ),
        "wider heads": claim("The effect grows with d", growing == sorted(growing)),
        "dot products": rf"d = {WIDTH} the scores have a standard deviation of "
                        rf"$\sqrt{{{WIDTH}}}$ = {WIDTH**0.5:.0f}",
        "saturation": f"the largest of {KEYS} weights for random keys is {largest:.2f} on "
                      f"average, and {largest_scaled:.2f} with the division",
        "slope": claim(
            f"Its slope with respect to its score, $w (1 - w)$, is {slope:.2f} instead of "
            f"{slope_scaled:.2f}, so less gradient reaches the queries and keys",
            slope < slope_scaled,
        ),
    }  # fmt: skip


def open_questions() -> dict[str, str]:
    """What would change with another reading of the sheet."""
    _, weights, outputs = attend(over=0)
    assert torch.equal(W_K, W_K.T)
    assert torch.equal(W_V, W_V.T)
    keys = attend()[1]
    assert torch.allclose(keys.sum(1), torch.ones(4).double())
    return {
        "over the keys": "so each row sums to 1 and the output is a weighted mean",
        "over the queries": f"the second numbers of the outputs would be {row(outputs[:, 1])}, and "
                            f"the rows would sum to {row(weights.sum(1))}",
        "symmetric": "Here all three matrices are symmetric, so both give the same result",
    }  # fmt: skip


def on_paper() -> None:
    """Prints every step as one would write it down."""
    q, k, v = (PATCHES @ w.T for w in (W_Q, W_K, W_V))
    scores, weights, outputs = attend()
    n = range(4)
    for i in n:
        print(f"p{i + 1} = ({row(PATCHES[i], 0)}):  q{i + 1} = W_Q p{i + 1} = ({row(q[i], 0)})"
              f"   k{i + 1} = W_K p{i + 1} = ({row(k[i], 0)})"
              f"   v{i + 1} = W_V p{i + 1} = ({row(v[i], 0)})")  # fmt: skip
    for i in n:
        print(f"\nquery {i + 1}")
        for j in n:
            (a, b), (c, d) = q[i].tolist(), k[j].tolist()
            print(f"  q{i + 1} . k{j + 1} = {a:g} * {c:g} + {b:g} * {d:g} = {scores[i, j]:g}")
        powers = [f"e^{score:g}" for score in scores[i].tolist()]
        print(f"  sum = {' + '.join(powers)} = {scores[i].exp().sum():.4f}")
        for j in n:
            print(f"  w{i + 1}{j + 1} = {powers[j]} / sum = {weights[i, j]:.4f}")
        terms = " + ".join(f"{weights[i, j]:.4f} * ({row(v[j], 0)})" for j in n)
        print(f"  o{i + 1} = {terms} = ({row(outputs[i])})")
    print("\nChecked against the text:")


def draw() -> None:
    """The figure: the weights, the outputs, and what happens in wider heads."""
    import matplotlib.pyplot as plt

    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(13, 3.8), width_ratios=(1.15, 1, 1.1), layout="constrained"
    )
    weights = 100 * attend()[1]
    shown = left.imshow(weights, cmap="Oranges", vmin=0, vmax=100)
    values = ", ".join(f"{x:.0f}" for x in (PATCHES @ W_V.T)[:, 1])
    for i in range(4):
        for j in range(4):
            left.text(j, i, f"{weights[i, j]:.1f}", ha="center", va="center",
                      color="white" if weights[i, j] > 60 else "black")  # fmt: skip
    ticks = [f"{i}" for i in range(1, 5)]
    left.set_xticks(range(4), ticks)
    left.set_yticks(range(4), ticks)
    left.set(
        xlabel=f"key j (second numbers of the values: {values})",
        ylabel="query i",
        title="Queries 1, 2 and 4 put most of their\nweight on patch 2, whose value is 0",
    )
    figure.colorbar(shown, ax=left, label="attention weight (%)")
    divided = r"scores divided by $\sqrt{d}$"
    kinds = ((-0.2, 1, "as on the sheet", "#c2571a"), (0.2, SCALE, divided, "gray"))
    for shift, scale, label, color in kinds:
        outputs = attend(scale)[2][:, 1]
        bars = middle.bar([i + shift for i in range(4)], outputs, 0.38, label=label, color=color)
        middle.bar_label(bars, fmt="%.2f", fontsize=8)
    middle.axhline(1, color="black", linestyle=":", label="mean of all values")
    middle.set_xticks(range(4), ticks)
    middle.set(xlabel="query i", ylabel="second number of the output", ylim=(0, 1.45),
               title="Their outputs are pulled below\nthe mean of the values")  # fmt: skip
    middle.legend(fontsize=8, ncols=2)
    widths = [2, 4, 8, 16, 32, 64, 128, 256, 512]
    for scaled, label, color in ((False, "scores not divided", "#c2571a"),
                                 (True, divided, "gray")):  # fmt: skip
        largest = [100 * random_attention(d, d**-0.5 if scaled else 1)[1] for d in widths]
        right.plot(widths, largest, "o-", label=label, color=color)
    right.axhline(100 / KEYS, color="black", linestyle=":", label="equal weights")
    right.set_xscale("log", base=2)
    right.set_xticks(widths, [str(d) for d in widths])
    right.set(xlabel="numbers per query and key, d", ylim=(0, 100),
              ylabel=f"largest of {KEYS} weights, mean (%)",
              title=r"Without the division by $\sqrt{d}$, one key" "\n"
                    "takes nearly all the weight in wide heads")  # fmt: skip
    right.legend(fontsize=8)
    right.grid(alpha=0.3)
    figure.savefig(ROOT / "theory" / "attention_by_hand.png", dpi=130)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    on_paper()
    check(__file__, given() | steps() | scaling() | open_questions(), SOURCES)
