"""How self-attention sees the whole image: the numbers in self_attention.md.

python theory/self_attention.py                    # prints the steps, and fails if the text differs
"""

import json

import torch
from _text import ROOT, check
from torch.utils.flop_counter import FlopCounterMode

from model import Attention, Block, VisionTransformer, ViTConfig


def macs(tokens: int, dim: int, heads: int = 4) -> int:
    """Multiply-adds of one attention layer, counted by torch on its matrix products."""
    with torch.device("meta"):  # shapes alone: nothing is computed, nothing takes memory
        layer, x = Attention(ViTConfig(embed_dim=dim, num_heads=heads)), torch.zeros(1, tokens, dim)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            layer(x, return_weights=True)
    return counter.get_total_flops() // 2


def counted() -> dict[str, str]:
    for tokens, dim in ((197, 768), (577, 768), (50, 64), (1000, 32)):
        assert macs(tokens, dim) == 4 * tokens * dim**2 + 2 * tokens**2 * dim
    one, four = macs(197, 768, heads=1), macs(197, 768, heads=12)
    assert one == four
    parts = 4 * 197 * 768**2, 2 * 197**2 * 768
    even = 2 * 768  # tokens at which both terms are equal
    assert 4 * even * 768**2 == 2 * even**2 * 768
    return {
        "the four linear maps": f"4 x 197 x 768^2 = {parts[0]:,}",
        "the two products": f"2 x 197^2 x 768 = {parts[1]:,}",
        "their share": f"{100 * parts[1] / sum(parts):.1f} % of the layer",
        "equal at": f"2 x 768 = {even:,} tokens",
        "twice the tokens": f"{macs(394, 768) / macs(197, 768):.2f} times",
        "twice the tokens, of many": f"{macs(40_000, 8) / macs(20_000, 8):.2f} times",
    }


def permuted() -> dict[str, str]:
    """What happens to outputs when the tokens change places."""
    torch.manual_seed(0)
    config = ViTConfig(img_size=32, patch_size=8, embed_dim=48, num_heads=4, depth=3, num_classes=5)
    x, order = torch.randn(2, 17, 48).double(), torch.randperm(17)
    gaps = []
    for layer in (Attention(config).double(), Block(config).double()):
        gaps.append((layer(x)[:, order] - layer(x[:, order])).abs().max().item())
    assert max(gaps) < 1e-12

    # The model: patches of an image in disorder, with its positions and without.
    model = VisionTransformer(config).double().eval()
    with torch.no_grad():  # larger weights than at the start, so that differences are seen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    images = torch.randn(2, 3, 32, 32).double()
    cut = images.unfold(2, 8, 8).unfold(3, 8, 8).reshape(2, 3, 16, 8, 8)[:, :, torch.randperm(16)]
    mixed = cut.reshape(2, 3, 4, 4, 8, 8).permute(0, 1, 2, 4, 3, 5).reshape(2, 3, 32, 32)

    def change() -> float:
        before = model(images)
        return ((model(mixed) - before).norm() / before.norm()).item()

    with torch.no_grad():
        with_positions = change()
        model.pos_embed.zero_()
        without = change()
    assert without < 1e-12
    return {
        "attention and block": "agree within 1e-12",
        "logits of patches in disorder, with positions": f"by {100 * with_positions:.0f} %",
        "without": "by less than 1e-12",
    }


def measured() -> dict[str, str]:
    said = {}
    for name, words in (("healthy", "with positions"), ("no-positions", "without")):
        path = ROOT / "theory" / "broken" / name / "metrics.json"
        accuracy = json.loads(path.read_text(encoding="utf-8"))["test_accuracy"]
        said[f"digits, {words}"] = f"{words} {100 * accuracy:.1f} %"
    place = ROOT / "results" / "official" / "attention_viz" / "3breeds-vit_s14-finetuned"
    blocks = json.loads((place / "metrics.json").read_text(encoding="utf-8"))["distance"]
    said["nearest and farthest head of block 2"] = (
        f"from {min(blocks[1]):.0f} to {max(blocks[1]):.0f} pixels"
    )
    return said


if __name__ == "__main__":
    check(__file__, counted() | permuted() | measured())
