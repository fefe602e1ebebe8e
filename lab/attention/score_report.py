"""Scores of maps as tables, figures and sentences, made from records (metrics.json) only."""

from pathlib import Path
from typing import Any

import numpy as np

from lab.core import checkpoints, plots

TRAINED, RANDOM = "trained", "random weights"
CENTER, CHANCE = "center Gaussian", "random order"  # baselines: a map, and a pixel order
MEASURES = {  # name in a record: short name, explanation
    "mass": ("mass on the animal", "fraction of the map's mass on the animal"),
    "pointing": ("pointing game", "the maximum of the map lies on the animal"),
    "average_precision": ("average precision", "average precision of pixels ranked by the map"),
    "iou": ("IoU", "intersection over union at the best validation threshold"),
}
_SHORT_NAMES = [short_name for short_name, _ in MEASURES.values()]
_KINDS = ("best block", "last block", "rollout", "gradient-rollout", "grad-cam")
_BASELINE_COLORS = {CENTER: "black", CHANCE: "gray"}


def percent(values: list[float]) -> str:
    """A fraction with its interval in percent, such as "61.2 (58.0 to 64.1)"."""
    mean, low, high = (100 * v for v in values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def points(values: list[float]) -> str:
    """A difference of fractions with its interval, such as "+3.1 (+1.0 to +5.2)"."""
    mean, low, high = (100 * v for v in values)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def candidates(record: dict[str, Any]) -> list[str]:
    """The maps to choose from: the best block on validation, the last block, and the others."""
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
        "weights. A value near 1 means that the map reflects the image, not what the model "
        "learned.",
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
    (True, False): "it finds the animal, but no better than with random weights",
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
            f"{points(precision[CENTER])} percentage points against a {CENTER}, "
            f"{points(precision[RANDOM])} against {RANDOM}: {_MEANINGS[beats]}."
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
    panels = 3 if "faithfulness" in record else 2
    size = (5.2 * panels, 5.4)
    figure, axes = plots.plt.subplots(1, panels, figsize=size, layout="constrained")
    for axis, measure in zip(axes, ("average_precision", "iou"), strict=False):
        _plot_measure(axis, record, measure)
    if panels == 3:
        _plot_curves(axes[2], record)
    for axis in axes:
        plots.legend_above(axis, 3 if axis is axes[-1] and panels == 3 else 2)
    finding = verdict(record)[-1].split(". ")[0]
    note = (f"{record['title']}: maps compared with the masks of {record['test_images']} test "
            "images. Bars and bands are 95 % intervals. A good map makes the probability fall fast "
            "in deletion and rise fast in insertion.")  # fmt: skip
    plots.set_title(figure, finding, note)
    plots.save_figure(figure, path)


def _style(name: str) -> tuple[str, str]:
    """The color and marker of a map: every block is "attention"."""
    if name in _BASELINE_COLORS:
        return _BASELINE_COLORS[name], ""
    return plots.METHODS["attention" if name.startswith(("block", "best", "last")) else name]


def _plot_measure(axis: plots.plt.Axes, record: dict[str, Any], measure: str) -> None:
    """A line over the blocks, then the other methods at ticks of their own."""
    blocks = _blocks(record)
    others = [name for name in record["methods"] if name not in blocks]
    numbers = list(range(1, len(blocks) + 1))
    step = max(1, len(blocks) / 6)
    places = [len(blocks) + step * (1 + i) for i in range(len(others))]
    for weights, shift in ((TRAINED, -0.12 * step), (RANDOM, 0.12 * step)):
        scores = {name: 100 * np.array(m[weights][measure]["mean"])
                  for name, m in record["methods"].items()}  # fmt: skip
        look = {"ms": 6, "mfc": None if weights == TRAINED else "white"}
        if blocks:
            mean, low, high = np.array([scores[name] for name in blocks]).T
            color, marker = _style(blocks[0])
            axis.plot(numbers, mean, "-" if weights == TRAINED else "--", color=color,
                      marker=marker, **look)  # fmt: skip
            axis.fill_between(numbers, low, high, color=color, alpha=0.12, lw=0)
        for x, name in zip(places, others, strict=True):
            mean, low, high = scores[name]
            color, marker = _style(name)
            axis.errorbar(x + shift, mean, [[mean - low], [high - mean]], color=color,
                          fmt=marker, capsize=3, **look)  # fmt: skip
        label = weights if weights == RANDOM else f"{weights} weights"
        axis.plot([], [], "o", color="gray", label=label, **look)
    for (name, scores), style in zip(record["baselines"].items(), (":", "-."), strict=True):
        value = 100 * scores[measure]["mean"][0]
        axis.axhline(value, color="black", ls=style, lw=1.2, label=name)
    shown = [i for i in numbers if len(blocks) <= 6 or i % 3 == 0]
    axis.set_xticks([*shown, *places], [*map(str, shown), *others])
    for label in axis.get_xticklabels()[len(shown) :]:
        label.set(rotation=20, ha="right")
    axis.set_xlim(0.4, (places or numbers)[-1] + 0.6 * step)
    axis.set(xlabel="block (mean of its heads), or method" if blocks else "method")
    axis.set_ylabel(f"{MEASURES[measure][1]} (%)", fontsize=9)
    axis.grid(axis="y", alpha=0.25)


def _plot_curves(axis: plots.plt.Axes, record: dict[str, Any]) -> None:
    """Deletion (solid) and insertion (dashed) curves of every pixel order."""
    for name, kinds in record["faithfulness"].items():
        color, marker = _style(name)
        x = np.linspace(0, 100, len(kinds["deletion"]["curve"]))
        last = name in _blocks(record)[-1:] and name != candidates(record)[0]
        for kind, style in (("deletion", "-"), ("insertion", "--")):
            axis.plot(x, 100 * np.array(kinds[kind]["curve"]), style, color=color, marker=marker,
                      ms=4, mfc="white" if last else None,
                      label=name if kind == "deletion" else None)  # fmt: skip
    axis.set(xlabel="pixels deleted (solid) or inserted (dashed), %", ylim=(0, 102),
             ylabel="probability of the predicted class (%)")  # fmt: skip
    axis.grid(alpha=0.25)


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
    size = (13, 2.6 + 0.95 * len(records))
    figure, axes = plots.plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    shown: dict[str, Any] = {}
    for axis, measure in zip(axes, ("average_precision", "iou"), strict=True):
        for row, record in enumerate(records):
            names = candidates(record)
            for i, name in enumerate(names):
                kind = name
                if name.startswith("block"):
                    kind = "best block" if i == 0 else "last block"
                color, marker = _style(kind)
                scores = record["methods"][name][TRAINED][measure]
                mean, low, high = (100 * v for v in scores["mean"])
                y = row + 0.16 * (i - (len(names) - 1) / 2)
                shown[kind] = axis.errorbar(
                    mean, y, xerr=[[mean - low], [high - mean]], fmt=marker, ms=6, capsize=2,
                    color=color, mfc="white" if kind == "last block" else None,
                )  # fmt: skip
            # Baselines are drawn per model because each model has its own crop of the image.
            for name, style in (("uniform", ":"), (CENTER, "-")):
                value = 100 * record["baselines"][name][measure]["mean"][0]
                shown[name] = axis.plot([value] * 2, [row - 0.4, row + 0.4], "k", ls=style)[0]
        axis.set(xlabel=f"{MEASURES[measure][0]} (%)")
        axis.grid(axis="x", alpha=0.25)
    titles = [record["title"] for record in records]
    axes[0].set_yticks(range(len(titles)), titles, fontsize=9)
    axes[0].invert_yaxis()
    kinds = [kind for kind in (*_KINDS, "uniform", CENTER) if kind in shown]
    plots.legend_above(axes[0], 4, handles=[shown[kind] for kind in kinds], labels=kinds)
    better = sum(
        any(record["methods"][name][TRAINED]["average_precision"][CENTER][1] > 0
            for name in candidates(record))
        for record in records
    )  # fmt: skip
    plots.set_title(
        figure,
        f"{better} of {len(records)} models have a map that finds the animal better than a "
        f"{CENTER}",
        f"{records[0]['images']}; mean and 95 % bootstrap interval over images.",
    )
    plots.save_figure(figure, path)
