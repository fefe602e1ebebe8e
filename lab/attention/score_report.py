"""Scores of attention maps as tables, pictures and sentences, all from the records.

What attention_viz.py --score does: one model's scores, and all models' side by side.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch

from lab.attention.localization import MEASURES, trimaps
from lab.attention.saliency import classes_of
from lab.attention.scoring import CENTRE, CHANCE, RANDOM, TRAINED, candidates, score
from lab.core import Run, checkpoints, plots
from lab.data.loaders import Loaders
from lab.models.pretrained import Pretrained, reinitialized

SHORT = {"mass": "mass on the animal", "pointing": "pointing game",
         "average_precision": "average precision", "iou": "IoU"}  # fmt: skip
KINDS = ("best block", "last block", "rollout", "gradient-rollout", "grad-cam")
COLOURS = (
    plots.VAL_COLOR,
    plots.TRAIN_COLOR,
    "#2a8a57",
    "#7b4fa3",
    "#a07a00",
    "#555555",
    "#b03060",
    "#008b8b",
)


def percent(values: list[float]) -> str:
    """A share with its interval, such as "61.2 (58.0 to 64.1)"."""
    mean, low, high = (100 * v for v in values)
    return f"{mean:.1f} ({low:.1f} to {high:.1f})"


def points(values: list[float]) -> str:
    """A difference of shares with its interval, such as "+3.1 (+1.0 to +5.2)"."""
    mean, low, high = (100 * v for v in values)
    return f"{mean:+.1f} ({low:+.1f} to {high:+.1f})"


def table(record: dict[str, Any]) -> str:
    """Every method, block and baseline in Markdown; in % with 95 % intervals."""
    lines = [
        f"{record['title']}: {record['test_images']} test images, of which the animal takes "
        f"{100 * record['animal_share']:.1f} %. In %, with 95 % bootstrap intervals over images.",
        "",
        "| map | weights | " + " | ".join(SHORT.values()) + " | like random weights |",
        "|---|---|" + "---|" * (len(SHORT) + 1),
    ]
    for name, found in record["methods"].items():
        for weights in (TRAINED, RANDOM):
            cells = [percent(found[weights][m]["mean"]) for m in MEASURES]
            like = f"{found['likeness']:.2f}" if weights == TRAINED else ""
            lines.append(f"| {name} | {weights} | " + " | ".join(cells) + f" | {like} |")
    for name, found in record["baselines"].items():
        cells = [percent(found[m]["mean"]) for m in MEASURES]
        lines.append(f"| {name} | none | " + " | ".join(cells) + " | |")
    lines += [
        "",
        "Like random weights: mean rank correlation with the map of the same architecture with "
        "random weights; near 1, the map shows the picture, not what was learnt.",
    ]
    if "faithfulness" in record:
        lines += [
            "",
            f"Deletion and insertion on {record['deletion_images']} of these images: area under "
            "the probability of the predicted class, in %.",
            "",
            "| order of the pixels | deletion (low is good) | to a random order "
            "| insertion (high is good) | to a random order |",
            "|---|---|---|---|---|",
        ]
        for name, found in record["faithfulness"].items():
            cells = [f"{percent(found[kind]['area'])} | {points(found[kind][CHANCE])}"
                     for kind in ("deletion", "insertion")]  # fmt: skip
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", *verdict(record), ""])


MEANINGS = {  # better than the centre's Gaussian, better than without training
    (True, True): "it finds the animal, and training taught it",
    (True, False): "it finds the animal, but no better than without training",
    (False, True): "training taught it something, but the picture's centre is as good a guess",
    (False, False): "no reason to believe it",
}


def verdict(record: dict[str, Any]) -> list[str]:
    """Which maps deserve trust here: a sentence for each method, then the whole."""
    lines, trusted = [], []
    for name in candidates(record):
        found = record["methods"][name][TRAINED]["average_precision"]
        gains = {rival: found[rival] for rival in (CENTRE, RANDOM)}
        better = tuple(gain[1] > 0 for gain in gains.values())
        told = "; ".join(f"{points(gain)} points to {rival}" for rival, gain in gains.items())
        sure = f"average precision {100 * found['mean'][0]:.1f} %"
        lines.append(f"- {name}: {sure}, {told}: {MEANINGS[better]}.")
        if all(better):
            trusted.append((found["mean"][0], name))
    if trusted:
        names = [name for _, name in sorted(trusted, reverse=True)]
        whole = f"Where the animal is: believe {', then '.join(names)}."
    else:
        whole = ("Where the animal is: believe none of these maps; a Gaussian at the centre or an "
                 "untrained model does as well.")  # fmt: skip
    return [*lines, "", f"{whole} {faithful(record)}".strip()]


def faithful(record: dict[str, Any]) -> str:
    """What deletion and insertion say, in a sentence."""
    areas = record.get("faithfulness")
    if not areas:
        return "The model has no classes, so deletion and insertion do not apply."
    good = [
        name
        for name in candidates(record)
        if areas[name]["deletion"][CHANCE][2] < 0 < areas[name]["insertion"][CHANCE][1]
    ]
    if not good:
        return ("What the model uses: no map orders the pixels better than chance in both deletion "
                "and insertion.")  # fmt: skip
    return (f"What the model uses: the order of the pixels by {', '.join(good)} beats a random one "
            "in deletion and insertion.")  # fmt: skip


def draw(path: Path, record: dict[str, Any]) -> None:
    """Average precision and IoU by block, the other methods and baselines beside; the curves."""
    panels = 3 if "faithfulness" in record else 2
    figure, axes = plt.subplots(1, panels, figsize=(5.6 * panels, 5.2), layout="constrained")
    blocks = [name for name in record["methods"] if name.startswith("block ")]
    others = [name for name in record["methods"] if name not in blocks]
    for axis, measure in zip(axes, ("average_precision", "iou"), strict=False):
        numbers = range(1, len(blocks) + 1)
        for weights, colour, style in ((TRAINED, plots.VAL_COLOR, "-"), (RANDOM, "gray", "--")):
            if blocks:
                rows = [record["methods"][name][weights][measure]["mean"] for name in blocks]
                mean, low, high = 100 * np.array(rows).T
                axis.plot(numbers, mean, style, color=colour, marker="o", ms=4,
                          label=f"attention of a block, {weights}")  # fmt: skip
                axis.fill_between(numbers, low, high, color=colour, alpha=0.15, lw=0)
        place = len(blocks) + 0.9
        for name, colour in zip(others, COLOURS[1:], strict=False):
            for weights, marker in ((TRAINED, "D"), (RANDOM, "x")):
                value = record["methods"][name][weights][measure]["mean"]
                bar(axis, place, value, colour, marker, f"{name}, {weights}")
                place += 0.45
        for (name, found), style in zip(record["baselines"].items(), (":", "-."), strict=True):
            axis.axhline(
                100 * found[measure]["mean"][0], color="black", ls=style, lw=1.2, label=name
            )
        ticks = [i for i in numbers if len(blocks) <= 12 or i % 2 == 0]
        axis.set_xticks(ticks, ticks)
        axis.set(xlabel="block (mean of its heads)", ylabel=f"{SHORT[measure]} (%)",
                 title=MEASURES[measure])  # fmt: skip
        axis.title.set_fontsize(10)
        axis.grid(alpha=0.25)
    if panels == 3:
        draw_curves(axes[2], record)
    axes[0].legend(fontsize=8)
    figure.suptitle(f"{record['title']}: maps against the outlines of {record['test_images']} test "
                    "images, with 95 % intervals")  # fmt: skip
    plots.save_figure(figure, path)


def bar(axis: plt.Axes, x: float, value: list[float], colour: str, marker: str, label: str) -> None:
    """One mean in % with its interval."""
    mean, low, high = (100 * v for v in value)
    axis.errorbar(x, mean, [[mean - low], [high - mean]], fmt=marker, color=colour, ms=6,
                  capsize=3, label=label)  # fmt: skip


def draw_curves(axis: plt.Axes, record: dict[str, Any]) -> None:
    """Deletion (full) and insertion (dashed) of every order of the pixels."""
    for (name, found), colour in zip(record["faithfulness"].items(), COLOURS, strict=False):
        share = np.linspace(0, 100, len(found["deletion"]["curve"]))
        for kind, style in (("deletion", "-"), ("insertion", "--")):
            axis.plot(share, 100 * np.array(found[kind]["curve"]), style, color=colour,
                      label=name if kind == "deletion" else None)  # fmt: skip
    axis.set(xlabel="pixels deleted (full lines) or inserted (dashed), %", ylim=(0, 102),
             ylabel="probability of the predicted class (%)")  # fmt: skip
    axis.set_title("deletion should fall fast, insertion rise fast", fontsize=10)
    axis.grid(alpha=0.25)
    axis.legend(fontsize=8)


def compare(place: Path, records: list[dict[str, Any]]) -> None:
    """One picture and one table of all models that were scored on the same images."""
    names = [record["title"] for record in records]
    images = records[0]["images"]
    head = [*SHORT.values(), "average precision to centre Gaussian"]
    lines = [
        f"Scored on {images}, in %, with 95 % bootstrap intervals over the images. Of the blocks, "
        "the one that the validation images chose and the last one.",
        "",
        f"| model | map | {' | '.join(head)} |",
        "|---|---|" + "---|" * len(head),
    ]
    size = (13, 2.6 + 0.95 * len(names))
    figure, axes = plt.subplots(1, 2, figsize=size, layout="constrained", sharey=True)
    panels = dict(zip(("average_precision", "iou"), axes, strict=True))
    kinds: dict[str, str] = {}
    for row, record in enumerate(records):
        shown = candidates(record)
        for i, name in enumerate(shown):
            found = record["methods"][name][TRAINED]
            cells = [percent(found[measure]["mean"]) for measure in MEASURES]
            cells.append(points(found["average_precision"][CENTRE]))
            lines.append(f"| {record['title']} | {name} | {' | '.join(cells)} |")
            kind = name if not name.startswith("block") else "last block" if i else "best block"
            colour = kinds.setdefault(kind, COLOURS[KINDS.index(kind)])
            for measure, axis in panels.items():
                mean, low, high = (100 * v for v in found[measure]["mean"])
                reach = [[mean - low], [high - mean]]
                style = {"fmt": "o", "color": colour, "ms": 5, "capsize": 2}
                axis.errorbar(mean, row + 0.14 * (i - (len(shown) - 1) / 2), xerr=reach, **style)
        for name, marker in (("uniform", ":"), (CENTRE, "-")):  # crops differ between models
            for measure, axis in panels.items():
                mean = 100 * record["baselines"][name][measure]["mean"][0]
                span = (row - 0.4, row + 0.4)
                axis.plot([mean, mean], span, "k", ls=marker, label=name if not row else None)
    for measure, axis in panels.items():
        axis.set(xlabel=f"{SHORT[measure]} (%)")
        axis.grid(alpha=0.25)
    for kind, colour in kinds.items():
        axes[1].plot([], [], "o", color=colour, label=kind)
    axes[0].set_yticks(range(len(names)), names, fontsize=9)
    axes[0].invert_yaxis()
    entries = axes[1].get_legend_handles_labels()
    figure.legend(*entries, loc="outside lower center", ncols=4, fontsize=9)
    figure.suptitle(f"Is the map where the animal is? {images}")
    plots.save_figure(figure, place.with_suffix(".png"))
    text = "\n".join([*lines, ""])
    checkpoints.write_atomically(
        place.with_suffix(".md"), lambda scratch: scratch.write_text(text, "utf-8")
    )


def scoring(pretrained: Pretrained, loaders: Loaders, c: SimpleNamespace) -> Callable[[Run], None]:
    """What attention_viz.py --score does, once a run's folder is open.

    Raises: UserError, for data without outlines.
    """
    data, model = loaders.data, pretrained.model
    outlines = {split: trimaps(data, getattr(data, split), c.DATA_DIR, pretrained.preprocess)
                for split in ("val", "test")}  # fmt: skip

    def score_it(run: Run) -> None:
        torch.manual_seed(c.SEED)
        models = {TRAINED: model, RANDOM: reinitialized(model).to(loaders.device).eval()}
        count = c.DELETION_IMAGES if classes_of(model) else 0
        record = {
            "title": run.folder.name.removesuffix("-score"),
            "images": f"{data.name}, {len(data.test)} test images",
            **score(models, loaders, outlines, predictions(model, loaders), count),
            "open": "score.png",
        }
        draw(run.folder / "score.png", record)
        text = table(record)
        checkpoints.write_atomically(
            run.folder / "score.md", lambda scratch: scratch.write_text(text, "utf-8")
        )
        checkpoints.write_json(run.folder / "metrics.json", record)
        print(f"{text}\n{run.folder / 'score.png'}")

        paths = sorted(Path(c.RESULTS_DIR).glob("*/metrics.json"))
        others = [json.loads(path.read_text("utf-8")) for path in paths]
        same = [other for other in others if other.get("images") == record["images"]]
        place = Path(c.RESULTS_DIR, f"scores-{data.name}-{len(data.test)}")
        compare(place, same)
        print(f"{place}.png")

    return score_it


def predictions(model: torch.nn.Module, loaders: Loaders) -> dict[str, torch.Tensor]:
    """The classes that are explained, (N,): the predicted ones; zeros where there are none."""
    found = {}
    for split in ("val", "test"):
        found[split] = torch.zeros(len(getattr(loaders.data, split)), dtype=torch.long)
        if classes_of(model):
            with torch.no_grad():
                for index, images, _ in loaders.evaluation(split):
                    found[split][index] = model(images).argmax(1).cpu()
    return found
