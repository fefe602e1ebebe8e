"""Self-attention on four patches, as on paper: the numbers in attention_by_hand.md.

python theory/attention_by_hand.py                 # prints the steps, and fails if the text differs
"""

import math

import torch
from _text import check

from model import Attention, ViTConfig

E = math.e
PATCHES = torch.tensor([[1, 2], [2, 0], [0, 1], [1, 1]], dtype=torch.float64)  # p1 .. p4, rows
W_Q = torch.eye(2, dtype=torch.float64)
W_K = torch.tensor([[1, 0], [0, 0]], dtype=torch.float64)
W_V = torch.tensor([[0, 0], [0, 1]], dtype=torch.float64)
EXACT = {  # the second number of each output; the first is 0
    1: ("(1 + 3e) / (1 + e)^2", (1 + 3 * E) / (1 + E) ** 2),
    2: ("(1 + 3e^2) / (1 + e^2)^2", (1 + 3 * E**2) / (1 + E**2) ** 2),
    3: ("1", 1.0),
    4: ("(1 + 3e) / (1 + e)^2", (1 + 3 * E) / (1 + E) ** 2),
}


def attend(scale: float = 1.0, over: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Predictions, weights and outputs; the softmax runs over the keys (1) or the queries (0)."""
    q, k, v = (PATCHES @ w.T for w in (W_Q, W_K, W_V))
    scores = q @ k.T * scale
    weights = scores.softmax(over)
    return scores, weights, weights @ v


def ours() -> torch.Tensor:
    """The outputs of the Attention of model.py with these weights."""
    layer = Attention(ViTConfig(embed_dim=2, num_heads=1, qkv_bias=False)).double()
    with torch.no_grad():
        # The layer divides by sqrt(2), which the sheet does not: larger queries undo it.
        layer.qkv.weight.copy_(torch.cat([W_Q * math.sqrt(2), W_K, W_V]))
        layer.proj.weight.copy_(torch.eye(2))
        layer.proj.bias.zero_()
        return layer(PATCHES[None])[0]


def row(values: torch.Tensor, digits: int = 4) -> str:
    return " | ".join(f"{value:.{digits}f}" if digits else f"{value:.0f}" for value in values)


def numbers() -> dict[str, str]:
    said = {}
    names = {"q": W_Q, "k": W_K, "v": W_V}
    for i, patch in enumerate(PATCHES, 1):
        found = [", ".join(f"{x:.0f}" for x in w @ patch) for w in names.values()]
        said[f"q, k, v of p{i}"] = f"| {i} | [{found[0]}] | [{found[1]}] | [{found[2]}] |"
    scores, weights, outputs = attend()
    for i in range(4):
        said[f"scores of query {i + 1}"] = f"| {i + 1} | {row(scores[i], 0)} |"
    for i in range(4):
        said[f"weights of query {i + 1}"] = f"| {row(weights[i])} |"
    for i, (words, value) in EXACT.items():
        assert abs(outputs[i - 1, 1].item() - value) < 1e-12
        assert outputs[i - 1, 0] == 0
        said[f"output {i}"] = (
            f"{words} = {value:.4f}" if words != "1" else "(2 + 0 + 1 + 1) / 4 = 1"
        )
    scaled = attend(2**-0.5)[2]
    said["with 1/sqrt(d)"] = ", ".join(f"{x:.4f}" for x in scaled[:, 1])
    sharp = attend()[1][1, 1].item(), attend(2**-0.5)[1][1, 1].item()
    said["the largest weight"] = f"from {sharp[0]:.4f} to {sharp[1]:.4f}"
    other = attend(over=0)[2]
    said["softmax over the queries"] = ", ".join(f"{x:.4f}" for x in other[:, 1])
    said["rows then sum to"] = ", ".join(f"{x:.4f}" for x in attend(over=0)[1].sum(1))
    assert torch.equal(W_K, W_K.T)
    assert torch.equal(W_V, W_V.T)
    gap = (ours() - outputs).abs().max().item()
    assert gap < 1e-6
    said["model.py's Attention"] = "agrees within 1e-6"
    return said


def on_paper() -> None:
    """Prints every step as one would write it down."""

    def vector(x: torch.Tensor) -> str:
        return f"[{', '.join(f'{value:g}' for value in x.tolist())}]"

    q, k, v = (PATCHES @ w.T for w in (W_Q, W_K, W_V))
    scores, weights, outputs = attend()
    n = range(4)
    for i in n:
        print(f"p{i + 1} = {vector(PATCHES[i])}:  q{i + 1} = W_Q p{i + 1} = {vector(q[i])}"
              f"   k{i + 1} = W_K p{i + 1} = {vector(k[i])}"
              f"   v{i + 1} = W_V p{i + 1} = {vector(v[i])}")  # fmt: skip
    for i in n:
        print(f"\nquery {i + 1}")
        for j in n:
            (a, b), (c, d) = q[i].tolist(), k[j].tolist()
            print(f"  q{i + 1} . k{j + 1} = {a:g} * {c:g} + {b:g} * {d:g} = {scores[i, j]:g}")
        powers = [f"e^{score:g}" for score in scores[i].tolist()]
        print(f"  sum = {' + '.join(powers)} = {scores[i].exp().sum():.4f}")
        for j in n:
            print(f"  w{i + 1}{j + 1} = {powers[j]} / sum = {weights[i, j]:.4f}")
        terms = " + ".join(f"{weights[i, j]:.4f} * {vector(v[j])}" for j in n)
        print(f"  o{i + 1} = {terms}\n     = [0, {EXACT[i + 1][0]}] = [0, {outputs[i, 1]:.4f}]")
    print("\nChecked against the text:")


if __name__ == "__main__":
    on_paper()
    check(__file__, numbers())
