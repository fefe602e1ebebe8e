"""Where the models attend: the numbers in attention_maps.md, from the records of attention_viz.py.

python theory/attention_maps.py                    # prints them, and fails if the text differs
python theory/attention_maps.py --draw             # draws attention_maps.png too
"""

import json
import sys

import numpy as np
from _text import ROOT, check, claim

from lab.report import sentences

RECORDS = ROOT / "results" / "official" / "attention_viz"
PATCH, GRID = 14, 16  # pixels of a patch of the ViT-S/14, and patches per side at 224 pixels
WINDOW, SWIN_PATCH, STAGES = 4, 2, (0, 2, 4)  # of our Swin: patches, pixels, first blocks
SHOWN = (2, 4)  # rows of the overview that the figure repeats
SOURCES = {  # the examples, and results of others
    "four patches, 2 x 2, and a class token": "the example",
    "in block 2 the class token attends only to patch 1; in block 1, patch 1 attends only to "
    "patch 2, and the class token to itself": "the example, computed by examples()",
    "In the order class token, patch 1, patch 2": "the example, computed by examples()",
    "The map of block 2 shows only patch 1": "the example",
    "block 12 is bright on the white woolly blanket": "overview.jpg",
    "with 95 % intervals over the test images": "lab/attention/scoring.py",
    "CC BY-SA 4.0": "the license of the photographs",
    "ranks four pixels; the first and the third belong to the animal":
        "the example, computed by examples()",
    "in DINOv2 the authors saw this only from ViT-L up": "Darcet et al. 2024, section 2",
    "In four of the six photographs, the brightest patches lie on the animal": "overview.jpg",
    "with patches of 2, 4 and 8 pixels": "checked by swin_said()",
    "Block 12 is bright on the object in all six": "overview.jpg",
}  # fmt: skip
Scores = dict[str, dict]  # of a record of attention_viz.py --score


def record(name: str) -> dict:
    return json.loads((RECORDS / name / "metrics.json").read_text(encoding="utf-8"))


def vector(values: np.ndarray) -> str:
    return f"({', '.join(f'{value:g}' for value in values)})"


def examples() -> dict[str, str]:
    """The small examples before each definition."""
    itself, *patches = (0.20, 0.50, 0.15, 0.10, 0.05)
    assert abs(itself + sum(patches) - 1) < 1e-12
    assert np.argmax(patches) == 0
    weights = np.array([[[1, 0, 0], [0, 0, 1], [0, 0, 1]],  # block 1: class token, patches 1, 2
                        [[0, 1, 0], [0, 1, 0], [0, 0, 1]]])  # block 2  # fmt: skip
    first, second = (weights + np.eye(3)) / 2
    assert second[0].tolist() == [0.5, 0.5, 0]
    mixed = (second @ first)[0]
    assert mixed[1] == mixed[2]
    equal, gradients = 0.5, np.array([2, -1])
    kept = equal * gradients
    near = (0.5, 0.3, 0.2)  # weights at a distance of 0, 1 and 2 patches
    distance = sum(weight * steps * PATCH for steps, weight in enumerate(near))
    path = " + ".join(rf"{weight} \cdot {steps * PATCH}" for steps, weight in enumerate(near))
    animal = np.array([True, False, True, False])
    precision = animal.cumsum() / np.arange(1, 5)
    full, half, none = probabilities = (1.0, 0.4, 0.2)
    area = 0.5 * (full + half) / 2 + 0.5 * (half + none) / 2
    return {
        "a map": f"gives the weight {itself:.2f} to itself and "
                 "{:.2f}, {:.2f}, {:.2f} and {:.2f} to the patches".format(*patches),
        "averaged": f"row of the class token in block 2 becomes ${vector(second[0])}$",
        "two blocks": f"and its product with the averaged rows of block 1 is $0.5 \\cdot "
                      f"{vector(first[0])} + 0.5 \\cdot {vector(first[1])} = {vector(mixed)}$: "
                      "patch 2 counts as much as patch 1",
        "weights": f"two patches get a weight of {equal} each",
        "signs": f"{gradients[0]:+d} and {gradients[1]:+d}. The products are "
                 f"{kept[0]:+.1f} and {kept[1]:+.1f}; the negative one becomes "
                 f"{max(kept[1], 0):.0f}",
        "near": "weight {} to itself, {} to its neighbor and {} to the patch after "
                "that".format(*near),
        "distance": f"${path} = {distance:.1f}$ pixels",
        "ranking": f"is 1/1 at the first hit and 2/3 at the second. Their mean, $(1/1 + 2/3) / 2 = "
                   f"{precision[animal].mean():.2f}$",
        "deletion": "{} with all pixels, {} without the brighter half and {} without "
                    "any".format(*probabilities),
        "area": rf"$0.5 \cdot ({full} + {half}) / 2 + 0.5 \cdot ({half} + {none}) / 2 = "
                f"{area:.2f}$",
    }  # fmt: skip


def models_said() -> dict[str, str]:
    """The two ViTs, and the size of a map."""
    tokens = GRID**2 + 1
    runs = [json.loads((RECORDS.parent / "finetune" / f"pets-3breeds-224-{name}-s0" /
                        "metrics.json").read_text(encoding="utf-8"))
            for name in ("full-decay0.7", "scratch")]  # fmt: skip
    tuned, scratch = (sentences.percent(run["test_accuracy"]) for run in runs)
    distances = np.array(record("3breeds-vit_s14-finetuned")["distance"])
    return {
        "tokens": f"A ViT-S/14 at {GRID * PATCH} pixels has ${GRID} \\cdot {GRID} + 1 = {tokens}$ "
                  f"tokens, so equal weights would be 1/{tokens} = {100 / tokens:.2f} %",
        "maps": f"{len(distances)} blocks of {distances.shape[1]} heads give {distances.size} maps "
                "for each image",
        "accuracy": f"It classifies {tuned} of the {runs[0]['test_images']} test images correctly",
        "scratch": f"trained from random weights on the same 270 images ({scratch} correct)",
    }  # fmt: skip


def distances_said() -> dict[str, str]:
    """How far the heads of the two ViTs look."""
    tuned = np.array(record("3breeds-vit_s14-finetuned")["distance"])  # blocks, heads
    scratch = np.array(record("3breeds-vit_s14-scratch")["distance"])
    grid = np.stack(np.meshgrid(np.arange(GRID), np.arange(GRID)), -1).reshape(-1, 2) * PATCH
    uniform = np.linalg.norm(grid[:, None] - grid, axis=-1).mean()
    means = tuned.mean(1)
    widest = int(np.ptp(tuned, axis=1).argmax())
    return {
        "uniform": f"equal weights would give {uniform:.0f} pixels",
        "by block": claim(
            f"The mean over the heads is largest in block 1 ({means[0]:.0f} pixels) and smallest "
            f"in block 2 ({means[1]:.0f} pixels). It then rises, though not "
            f"steadily, to {means[10]:.0f} pixels in block 11 and {means[11]:.0f} in block 12",
            means.argmax() == 0, means.argmin() == 1, means[1:].argmax() + 1 == 10,
            (np.diff(means[1:11]) < 0).any()),
        "heads": f"Heads of one block differ most in block {widest + 1}, from "
                 f"{tuned[widest].min():.0f} to {tuned[widest].max():.0f} pixels",
        "nearest": claim(f"the most local head of block 2 has a mean distance of "
                         f"{tuned[1].min():.0f} pixels, about one patch",
                         tuned[1].min() < 1.5 * PATCH),
        "heads from scratch": claim(
            f"All its heads lie between {scratch.min():.0f} and {scratch.max():.0f} pixels, close "
            "to the value for equal weights", abs(scratch - uniform).max() < 0.03 * uniform),
    }  # fmt: skip


def swin_said() -> dict[str, str]:
    """What the windows allow, what equal weights in them would give, and what was measured."""
    measured = record("3breeds-swin-finetuned")["distance"]
    cells = np.stack(np.meshgrid(np.arange(WINDOW), np.arange(WINDOW)), -1).reshape(-1, 2)
    apart = np.linalg.norm(cells[:, None] - cells, axis=-1)
    patches = [SWIN_PATCH * 2**stage for stage in range(len(STAGES))]
    assert patches == [2, 4, 8]
    means = [np.mean([*measured[i], *measured[i + 1]]) for i in STAGES]
    assert all(mean < apart.max() * patch for mean, patch in zip(means, patches, strict=True))

    def row(values: list[float]) -> str:
        return "{:.0f}, {:.0f} and {:.0f} pixels".format(*values)

    return {
        "windows": f"Our Swin's windows of {WINDOW} x {WINDOW} patches",
        "limit": f"allow at most {row([apart.max() * patch for patch in patches])}",
        "equal": f"equal weights in a window would give "
                 f"{row([apart.mean() * patch for patch in patches])}",
        "measured": f"we measured {row(means)}",
    }  # fmt: skip


def points(values: list[float], signs: bool = True) -> str:
    """A mean and its 95 % interval, in percent or points."""
    mean, low, high = (f"{100 * value:{'+' if signs else ''}.1f}" for value in values)
    return f"{mean} ({low} to {high})"


def precision_said(tuned: Scores, scratch: Scores) -> dict[str, str]:
    """Agreement of the maps with the outlines of the animals."""

    def precision(scores: Scores, method: str) -> dict:
        return scores["methods"][method]["trained"]["average_precision"]

    def row(name: str, found: dict) -> str:
        return (f"| {name} | {points(found['mean'], False)} | {points(found['center Gaussian'])} "
                f"| {points(found['random weights'])} |")  # fmt: skip

    named = {"block 11": "fine-tuned, block 11", "block 12": "fine-tuned, block 12",
             "gradient-rollout": "fine-tuned, gradient rollout",
             "rollout": "fine-tuned, rollout"}  # fmt: skip
    said = {name: row(name, precision(tuned, method)) for method, name in named.items()}
    best = max(scratch["methods"], key=lambda method: precision(scratch, method)["mean"][0])
    said["bare"] = row(f"from scratch, {best} (the best on these images)", precision(scratch, best))
    gaussian = tuned["baselines"]["center Gaussian"]["average_precision"]["mean"]
    mass = {name: tuned["methods"][name]["trained"]["mass"]["mean"] for name in named}
    pointing = {name: tuned["methods"][name]["trained"]["pointing"]["mean"] for name in named}
    before = precision(record("3breeds-vit_s14-pretrained-score"), "block 12")
    good = [precision(tuned, method) for method in ("block 11", "block 12", "gradient-rollout")]
    bad = [precision(tuned, "rollout"), precision(scratch, best)]
    early = [precision(tuned, f"block {i}")["center Gaussian"][2] for i in range(1, 10)]
    return said | {
        "share": claim(
            f"**The last block attends to the animal.** The animal covers "
            f"{sentences.percent(tuned['animal_share'])} of the pixels and gets "
            f"{sentences.percent(mass['block 12'][0])} of the attention that block 12 pays to "
            "patches", mass["block 12"][1] > 2 * tuned["animal_share"]),
        "uninformative": f"A map that knows nothing scores "
                         f"{sentences.percent(tuned['animal_share'])}, a Gaussian at the center "
                         f"{sentences.percent(gaussian[0])}",
        "good": claim(
            "The last two blocks and gradient rollout beat the Gaussian by more than 10 points and "
            "the same architecture with random weights by more than 40",
            *(found["center Gaussian"][1] > 0.10 for found in good),
            *(found["random weights"][0] > 0.40 for found in good)),
        "bad": claim("Rollout and every map of the ViT from scratch lose to the Gaussian",
                     *(found["center Gaussian"][2] < 0 for found in bad)),
        "early": claim("and so do blocks 1 to 9 of the fine-tuned model", max(early) < 0),
        "before": f"block 12 of the pretrained model already scored "
                  f"{sentences.percent(before['mean'][0])}",
        "pointing": claim(
            "Its brightest point lies on the animal in "
            f"{sentences.percent(pointing['rollout'][0])} of the test images, less often than that "
            f"of block 12 ({sentences.percent(pointing['block 12'][0])})",
            pointing["rollout"][2] < pointing["block 12"][1]),
    }  # fmt: skip


def faithfulness_said(tuned: Scores, scratch: Scores) -> dict[str, str]:
    """Whether the models use what is bright."""
    (count,) = {scores["deletion_images"] for scores in (tuned, scratch)}

    def change(method: str, kind: str, scores: Scores = tuned) -> list[float]:
        return scores["faithfulness"][method][kind]["random order"]

    both = [change(name, "insertion") for name in ("gradient-rollout", "center Gaussian")]
    gradient, gaussian, rollout = (
        change(name, "deletion") for name in ("gradient-rollout", "center Gaussian", "rollout")
    )
    bare = change("gradient-rollout", "deletion", scratch)
    poor = scratch["methods"]["gradient-rollout"]["trained"]["average_precision"]
    return {
        "images": f"On {count} images, relative to a random order",
        "deletion by map": claim(
            f"the area changes by {points(gradient)} points with gradient rollout, by "
            f"{points(rollout)} with rollout and by {points(gaussian)} with the Gaussian; the last "
            "two are not better than a random order",
            gradient[2] < 0, rollout[2] > 0, gaussian[2] > 0),
        "insertion": claim(
            f"Its area changes by {points(both[0])} points with gradient rollout and by "
            f"{points(both[1])} with the Gaussian, which does not even look at the image",
            both[0][1] < both[1][0] < both[0][2], both[1][1] < both[0][0] < both[1][2]),
        "faithful": claim(
            f"Gradient rollout of the ViT from scratch has a low average precision, "
            f"{sentences.percent(poor['mean'][0])}, but in deletion it changes the area by "
            f"{points(bare)} points",
            bare[2] < 0, poor["center Gaussian"][2] < 0),
    }  # fmt: skip


def cifar_said() -> dict[str, str]:
    """Six test images of CIFAR-10, and a linear head on frozen features."""
    images = record("cifar10-jpeg-224-head")["images"]
    wrong = [image for image in images if image["prediction"] != image["label"]]
    assert len(images) == 6
    assert [image["label"] for image in wrong] == ["airplane"] * 3
    first, second, third = (image["prediction"] for image in wrong)
    return {
        "CIFAR-10": f"although three airplanes are classified as {first}, {second} and {third}",
    }


def numbers() -> dict[str, str]:
    tuned, scratch = (record(f"3breeds-vit_s14-{name}-score") for name in ("finetuned", "scratch"))
    return (examples() | models_said() | distances_said() | swin_said()
            | precision_said(tuned, scratch) | faithfulness_said(tuned, scratch)
            | cifar_said())  # fmt: skip


def photographs() -> list[list[np.ndarray]]:
    """The panels of the committed overview: rows of a photograph and its three maps."""
    import matplotlib.pyplot as plt

    page = plt.imread(RECORDS / "3breeds-vit_s14-finetuned" / "overview.jpg")
    drawn = page.min(axis=-1) < 250  # not the white between the panels

    def runs(share: np.ndarray) -> list[slice]:
        edges = np.flatnonzero(np.diff(np.r_[False, share > 0.75, False]))
        return [slice(start, stop) for start, stop in edges.reshape(-1, 2) if stop - start > 50]

    columns = runs(drawn.mean(axis=0))
    rows = runs(drawn[:, columns[1]].mean(axis=1))
    assert (len(rows), len(columns)) == (6, 4)
    return [[page[row, column] for column in columns] for row in rows]


def draw() -> None:
    """The figure: maps of two photographs, distances by block, and average precision by block."""
    import matplotlib.pyplot as plt

    figure = plt.figure(figsize=(14.5, 5), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(1.25, 1))
    axes = left.subplots(2, 4)
    panels = photographs()
    titles = ("correct:\nAbyssinian", "block 12, mean of heads", "rollout", "gradient rollout")
    for row, (ax, shown) in enumerate(zip(axes, SHOWN, strict=True)):
        for axis, panel, title in zip(ax, panels[shown], titles, strict=True):
            axis.imshow(panel)
            axis.set_axis_off()
            axis.set_title(title, fontsize=9)
        if row == 1:
            ax[0].set_title("wrong: Abyssinian taken\nfor an American Bulldog", fontsize=9)
    scale = plt.cm.ScalarMappable(plt.Normalize(0, 100), "inferno")
    left.colorbar(scale, ax=axes, label="% of the map's 99th percentile", shrink=0.8)
    left.suptitle("Correct answer: block 12 and gradient rollout are bright on the cat.\n"
                  "Wrong answer: they are bright on the blanket", fontsize=10.5)  # fmt: skip
    distance, precision = right.subplots(1, 2)
    styles = (("finetuned", "fine-tuned", "#c2571a"), ("scratch", "from scratch", "gray"))
    for name, label, color in styles:
        values = np.array(record(f"3breeds-vit_s14-{name}")["distance"])
        blocks = np.arange(1, len(values) + 1)
        distance.plot(np.repeat(blocks, values.shape[1]), values.ravel(), "o", color=color,
                      markersize=4, alpha=0.5)  # fmt: skip
        distance.plot(blocks, values.mean(1), color=color, label=f"{label}, mean of heads")
        scores = record(f"3breeds-vit_s14-{name}-score")
        found = [scores["methods"][f"block {i}"]["trained"]["average_precision"]["mean"]
                 for i in blocks]  # fmt: skip
        mean, low, high = 100 * np.array(found).T
        precision.errorbar(blocks, mean, (mean - low, high - mean), color=color, label=label,
                           capsize=2)  # fmt: skip
    distance.set(title="Only the pretrained ViT has local heads;\nblocks 2 to 6 are the most local",
                 ylabel="mean attention distance (pixels)", ylim=0)  # fmt: skip
    for shown, label, style in (("center Gaussian", "Gaussian at the center", "--"),
                                ("uniform", "uninformative map", ":")):  # fmt: skip
        value = 100 * scores["baselines"][shown]["average_precision"]["mean"][0]
        precision.axhline(value, color="black", linestyle=style, label=label)
    precision.set(title="Only the last blocks of the pretrained\nViT beat a Gaussian at the center",
                  ylabel="average precision (%), 95 % interval")  # fmt: skip
    for axis in (distance, precision):
        axis.title.set_fontsize(10)
        axis.set_xticks(blocks)
        axis.set_xlabel("block")
        axis.grid(alpha=0.3)
    distance.legend(fontsize=8, loc="lower right")
    precision.legend(fontsize=8, loc="upper left")
    figure.savefig(ROOT / "theory" / "attention_maps.png", dpi=110)


if __name__ == "__main__":
    if "--draw" in sys.argv:
        draw()
    check(__file__, numbers(), SOURCES)
