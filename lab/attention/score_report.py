"""Scores of maps as tables, figures and sentences, made from records (metrics.json) only."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lab.core import checkpoints

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TRAINED, RANDOM = "trained", "random weights"
CENTER, CHANCE = "center Gaussian", "random order"  # references: a map, and an order of pixels
MEASURES = {  # name in a record: short name, explanation
    "mass": ("mass on the animal", "fraction of the map's mass on the animal"),
    "pointing": ("pointing game", "the maximum of the map lies on the animal"),
    "average_precision": ("average precision", "average precision of pixels ranked by the map"),
    "iou": ("IoU", "intersection over union at the best validation threshold"),
}
_SHORT_NAMES = [short_name for short_name, _ in MEASURES.values()]
_KINDS = ("best block", "last block", "rollout", "gradient-rollout", "grad-cam")
_COLORS = ("#1f5fa8", "#c2571a", "#2a8a57", "#7b4fa3", "#a07a00", "#555555", "#b03060", "#008b8b")


def percent(values: list[float]) -> str:
    """A fraction with its interval in percent, such as "61.2 (58.0 to 64.1)"."""
    mean, low, high = (100 * v for v in values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def points(values: list[float]) -> str:
    """A difference of fractions with its interval, such as "+3.1 (+1.0 to +5.2)"."""
    mean, low, high = (100 * v for v in values)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def candidates(record: dict[str, Any]) -> list[str]:
    """The maps a user would choose from: the best block on validation, the last block, the rest."""
    methods = record["methods"]
    blocks = _blocks(record)
    others = [name for name in methods if name not in blocks]
    if not blocks:
        return others
    best = max(blocks, key=lambda name: methods[name]["validation"])
    return [*dict.fromkeys([best, blocks[-1]]), *others]


def _blocks(record: dict[str, Any]) -> list[str]:
    return [name for name in record["methods"] if name.startswith("block ")]


def to_markdown(record: dict[str, Any]) -> str:
    """Every method and baseline as a table in %, followed by the verdict."""
    lines = [
        f"{record['title']}: {record['test_images']} test images. The animal covers "
        f"{100 * record['animal_share']:.1f} % of the average image. All values are in % with "
        "95 % bootstrap intervals over images.",
        "",
        f"| map | weights | {' | '.join(_SHORT_NAMES)} | rank correlation |",
        "|---|---|" + "---|" * (len(MEASURES) + 1),
    ]
    for name, scores in record["methods"].items():
        for weights in (TRAINED, RANDOM):
            cells = [percent(scores[weights][measure]["mean"]) for measure in MEASURES]
            correlation = f"{scores['rank_correlation']:.2f}" if weights == TRAINED else ""
            lines.append(f"| {name} | {weights} | {' | '.join(cells)} | {correlation} |")
    for name, scores in record["baselines"].items():
        cells = [percent(scores[measure]["mean"]) for measure in MEASURES]
        lines.append(f"| {name} | none | {' | '.join(cells)} | |")
    lines += [
        "",
        "Rank correlation: the mean correlation with the map of the same architecture with random "
        "weights. Near 1, the map shows the image, not what the model learned.",
    ]
    if "faithfulness" in record:
        lines += [
            "",
            f"Deletion and insertion on {record['deletion_images']} of these images: the area "
            "under the curve of the probability of the predicted class, in %.",
            "",
            "| pixel order | deletion (lower is better) | minus random order "
            "| insertion (higher is better) | minus random order |",
            "|---|---|---|---|---|",
        ]
        for name, kinds in record["faithfulness"].items():
            cells = [f"{percent(kinds[kind]['area'])} | {points(kinds[kind][CHANCE])}"
                     for kind in ("deletion", "insertion")]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdict(record), ""])


_MEANINGS = {  # by: beats the center Gaussian, beats random weights
    (True, True): "it finds the animal because of training",
    (True, False): "it finds the animal, but no better than without training",
    (False, True): "training improves it, but the center of the image is as good a guess",
    (False, False): "there is no reason to trust it",
}


def verdict(record: dict[str, Any]) -> list[str]:
    """Which maps to trust: a sentence for each candidate, then an overall conclusion."""
    lines, trusted = [], []
    for name in candidates(record):
        precision = record["methods"][name][TRAINED]["average_precision"]
        beats = tuple(precision[reference][1] > 0 for reference in (CENTER, RANDOM))
        lines.append(
            f"- {name}: average precision {100 * precision['mean'][0]:.1f} %, "
            f"{points(precision[CENTER])} points against a {CENTER}, {points(precision[RANDOM])} "
            f"against {RANDOM}: {_MEANINGS[beats]}."
        )
        if all(beats):
            trusted.append((precision["mean"][0], name))
    if trusted:
        names = [name for _, name in sorted(trusted, reverse=True)]
        conclusion = f"To find the animal, trust {', then '.join(names)}."
    else:
        conclusion = (
            "To find the animal, trust none of these maps: a Gaussian at the center or an "
            "untrained model does as well."
        )
    return [*lines, "", f"{conclusion} {_faithfulness_summary(record)}"]


def _faithfulness_summary(record: dict[str, Any]) -> str:
    """The result of deletion and insertion in one sentence."""
    areas = record.get("faithfulness")
    if not areas:
        return "Deletion and insertion were not measured."
    better = [
        name
        for name in candidates(record)
        if areas[name]["deletion"][CHANCE][2] < 0 < areas[name]["insertion"][CHANCE][1]
    ]
    return (
        f"Better than a random order in both deletion and insertion: {', '.join(better) or 'none'}."
    )


def write(folder: Path, record: dict[str, Any]) -> None:
    """Writes score.md and score.png."""
    text = to_markdown(record)
    checkpoints.write_atomically(folder / "score.md", lambda path: path.write_text(text, "utf-8"))
    _plot(folder / "score.png", record)


def _plot(path: Path, record: dict[str, Any]) -> None:
    """Average precision and IoU of all blocks, other methods and baselines; then the curves."""
    from lab.core import plots

    panels = 3 if "faithfulness" in record else 2
    size = (5.6 * panels, 5.2)
    figure, axes = plots.plt.subplots(1, panels, figsize=size, layout="constrained")
    for axis, measure in zip(axes, ("average_precision", "iou"), strict=False):
        _plot_measure(axis, record, measure)
    if panels == 3:
        _plot_curves(axes[2], record)
    axes[0].legend(fontsize=8)
    figure.suptitle(
        f"{record['title']}: maps compared with the outlines of {record['test_images']} test "
        "images (95 % intervals)"
    )
    plots.save_figure(figure, path)


def _plot_measure(axis: "Axes", record: dict[str, Any], measure: str) -> None:
    short_name, explanation = MEASURES[measure]
    blocks = _blocks(record)
    numbers = range(1, len(blocks) + 1)
    if blocks:
        for weights, color, style in ((TRAINED, _COLORS[0], "-"), (RANDOM, "gray", "--")):
            rows = [record["methods"][name][weights][measure]["mean"] for name in blocks]
            mean, low, high = 100 * np.array(rows).T
            axis.plot(numbers, mean, style, color=color, marker="o", ms=4,
                      label=f"attention of one block, {weights}")  # fmt: skip
            axis.fill_between(numbers, low, high, color=color, alpha=0.15, lw=0)
    x = len(blocks) + 0.9
    others = [name for name in record["methods"] if name not in blocks]
    for name, color in zip(others, _COLORS[1:], strict=False):
        for weights, marker in ((TRAINED, "D"), (RANDOM, "x")):
            mean, low, high = (100 * v for v in record["methods"][name][weights][measure]["mean"])
            axis.errorbar(x, mean, [[mean - low], [high - mean]], fmt=marker, color=color, ms=6,
                          capsize=3, label=f"{name}, {weights}")  # fmt: skip
            x += 0.45
    for (name, scores), style in zip(record["baselines"].items(), (":", "-."), strict=True):
        value = 100 * scores[measure]["mean"][0]
        axis.axhline(value, color="black", ls=style, lw=1.2, label=name)
    ticks = [i for i in numbers if len(blocks) <= 12 or i % 2 == 0]
    axis.set_xticks(ticks, ticks)
    axis.set(xlabel="block (mean of its heads)", ylabel=f"{short_name} (%)")
    axis.set_title(explanation, fontsize=10)
    axis.grid(alpha=0.25)


def _plot_curves(axis: "Axes", record: dict[str, Any]) -> None:
    """Deletion (solid) and insertion (dashed) curves of every pixel order."""
    for (name, kinds), color in zip(record["faithfulness"].items(), _COLORS, strict=False):
        x = np.linspace(0, 100, len(kinds["deletion"]["curve"]))
        for kind, style in (("deletion", "-"), ("insertion", "--")):
            axis.plot(x, 100 * np.array(kinds[kind]["curve"]), style, color=color,
                      label=name if kind == "deletion" else None)  # fmt: skip
    axis.set(xlabel="pixels deleted (solid) or inserted (dashed), %", ylim=(0, 102),
             ylabel="probability of the predicted class (%)")  # fmt: skip
    axis.set_title("a good map lets deletion fall fast and insertion rise fast", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def compare(path: Path, records: list[dict[str, Any]]) -> None:
    """Writes one table (.md) and one figure (.png) of all models scored on the same images."""
    images = records[0]["images"]
    columns = [*_SHORT_NAMES, f"average precision minus {CENTER}"]
    lines = [
        f"Scores on {images}, in %, with 95 % bootstrap intervals over images. The blocks shown "
        "are the best one on the validation images and the last one.",
        "",
        f"| model | map | {' | '.join(columns)} |",
        "|---|---|" + "---|" * len(columns),
    ]
    for record in records:
        for name in candidates(record):
            scores = record["methods"][name][TRAINED]
            cells = [percent(scores[measure]["mean"]) for measure in MEASURES]
            cells.append(points(scores["average_precision"][CENTER]))
            lines.append(f"| {record['title']} | {name} | {' | '.join(cells)} |")
    text = "\n".join([*lines, ""])
    checkpoints.write_atomically(path.with_suffix(".md"), lambda p: p.write_text(text, "utf-8"))
    _plot_comparison(path.with_suffix(".png"), records)


def _plot_comparison(path: Path, records: list[dict[str, Any]]) -> None:
    from lab.core import plots

    size = (13, 2.6 + 0.95 * len(records))
    figure, axes = plots.plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    colors = dict(zip(_KINDS, _COLORS, strict=False))
    shown: set[str] = set()
    for axis, measure in zip(axes, ("average_precision", "iou"), strict=True):
        for row, record in enumerate(records):
            names = candidates(record)
            for i, name in enumerate(names):
                kind = name
                if name.startswith("block"):
                    kind = "best block" if i == 0 else "last block"
                shown.add(kind)
                scores = record["methods"][name][TRAINED]
                mean, low, high = (100 * v for v in scores[measure]["mean"])
                y = row + 0.14 * (i - (len(names) - 1) / 2)
                axis.errorbar(mean, y, xerr=[[mean - low], [high - mean]], fmt="o", ms=5,
                              capsize=2, color=colors[kind])  # fmt: skip
            # Baselines are drawn per model because each model has its own crop of the image.
            for name, style in (("uniform", ":"), (CENTER, "-")):
                value = 100 * record["baselines"][name][measure]["mean"][0]
                label = name if row == 0 else None
                axis.plot([value] * 2, [row - 0.4, row + 0.4], "k", ls=style, label=label)
        axis.set(xlabel=f"{MEASURES[measure][0]} (%)")
        axis.grid(alpha=0.25)
    for kind in filter(shown.__contains__, _KINDS):
        axes[1].plot([], [], "o", color=colors[kind], label=kind)
    titles = [record["title"] for record in records]
    axes[0].set_yticks(range(len(titles)), titles, fontsize=9)
    axes[0].invert_yaxis()
    handles = axes[1].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"Do the maps find the animal? {records[0]['images']}")
    plots.save_figure(figure, path)
