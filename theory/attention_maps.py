"""The numbers in attention_maps.md, from the records of the runs that it discusses.

python theory/attention_maps.py                    # prints them, and fails if the text differs
"""

import json

import numpy as np
from _text import ROOT, check

RECORDS = ROOT / "results" / "official" / "attention_viz"


def record(name: str) -> dict:
    return json.loads((RECORDS / name / "metrics.json").read_text(encoding="utf-8"))


def percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def numbers() -> dict[str, str]:
    """What is said, and the words that the text must hold."""
    tokens = (224 // 14) ** 2 + 1
    found = {
        "tokens of a ViT-S/14 at 224 pixels": f"16 x 16 + 1 = {tokens}",
        "an even share of attention": f"1 / {tokens} = {100 / tokens:.2f} %",
    }
    for name in ("full-decay0.7", "scratch"):
        run = RECORDS.parent / "finetune" / f"pets-3breeds-224-{name}-s0" / "metrics.json"
        metrics = json.loads(run.read_text(encoding="utf-8"))
        found[f"accuracy, {name}"] = percent(metrics["test_accuracy"])
        found["test images"] = f"of {metrics['test_images']} test images"
    tuned = record("3breeds-vit_s14-finetuned")["distance"]
    scratch = [head for block in record("3breeds-vit_s14-scratch")["distance"] for head in block]
    swin = record("3breeds-swin-finetuned")["distance"]
    grid = np.stack(np.meshgrid(np.arange(16), np.arange(16)), -1).reshape(-1, 2) * 14
    even = np.linalg.norm(grid[:, None] - grid, axis=-1).mean()
    found |= {
        "distance if attention were even": f"{even:.0f} pixels",
        "heads of block 2": f"from {min(tuned[1]):.0f} to {max(tuned[1]):.0f} pixels",
        "mean of block 2": f"{np.mean(tuned[1]):.0f} pixels in block 2",
        "mean of block 11": f"{np.mean(tuned[10]):.0f} pixels in block 11",
        "from scratch": f"between {min(scratch):.0f} and {max(scratch):.0f} pixels",
        "Swin": ", ".join(f"{np.mean(swin[i]):.0f}" for i in (0, 2, 4)) + " pixels",
    }
    scores = {name: record(f"3breeds-{name}-score") for name in
              ("vit_s14-pretrained", "vit_s14-finetuned", "vit_s14-scratch")}  # fmt: skip
    pretrained, finetuned, bare = scores.values()
    found["the animal's share"] = percent(finetuned["animal_share"])
    center = finetuned["baselines"]["center Gaussian"]["average_precision"]["mean"][0]
    found["center Gaussian"] = f"a Gaussian at the center {percent(center)}"

    def precision(scores: dict, method: str) -> str:
        return percent(scores["methods"][method]["trained"]["average_precision"]["mean"][0])

    for method in ("block 11", "block 12", "rollout", "gradient-rollout"):
        found[f"fine-tuned, {method}"] = f"{method} {precision(finetuned, method)}"
    mass = finetuned["methods"]["block 12"]["trained"]["mass"]["mean"][0]
    found["mass on the animal"] = f"{percent(mass)} of the last block's attention"
    found["pretrained, block 12"] = f"block 12 {precision(pretrained, 'block 12')} before"
    best = max(bare["methods"].values(), key=lambda m: m["trained"]["average_precision"]["mean"][0])
    value = percent(best["trained"]["average_precision"]["mean"][0])
    found["from scratch, the best of all maps"] = f"the best of its maps {value}"
    for kind in ("deletion", "insertion"):
        mean, low, high = finetuned["faithfulness"]["gradient-rollout"][kind]["random order"]
        found[kind] = f"{kind} {100 * mean:+.1f} points ({100 * low:+.1f} to {100 * high:+.1f})"
    return found


if __name__ == "__main__":
    check(__file__, numbers())
