"""Tables of results in Markdown: for results/README.md, and between the markers of README.md."""

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

from lab.attention.score_report import CENTER, RANDOM, candidates, percent, points
from lab.core import Run, UserError
from lab.report import sentences as words
from lab.report.comparisons import (
    Configuration,
    chosen,
    configurations,
    efficiencies,
    pairs,
    twins,
)
from lab.report.records import TASKS, Found, Record

MARKER = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.S)
Link = Callable[[Path], str]


def table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def cell(text: str) -> str:
    """Text that cannot end a table's cell, a line or a link."""
    return re.sub(r"([|\\\[\]<>`*])", r"\\\1", " ".join(text.split()))


def link(name: str, folder: Path, to: Link) -> str:
    return f"[{cell(name)}]({quote(to(folder), safe='/')}/)"


def runs_table(runs: list[Record], to: Link) -> str:
    """Finished runs, a line each."""
    rows = []
    for run in sorted((r for r in runs if r.metrics), key=lambda r: r.folder.as_posix()):
        m, model = run.metrics, run.config["model"]
        low, high = (100 * share for share in m["test_accuracy_95"])
        memory = m.get("peak_memory_mb")
        rows.append([
            link(run.folder.name, run.folder, to),
            trained(model),
            f"{model['macs'] / 1e6:,.1f}M", f"{m['epochs']}",
            f"**{100 * m['test_accuracy']:.2f} %** ({low:.1f} to {high:.1f}, "
            f"{m['test_images']:,} images)",
            f"{m['training_seconds']:,.0f} s", f"{m['images_per_second']:,}",
            f"{memory:,} MB" if memory else "",
        ])  # fmt: skip
    head = ["run", "trained parameters", "multiply-adds", "epochs",
            "test accuracy (95 % interval)", "training", "images/s", "peak memory"]  # fmt: skip
    return table(head, rows) if rows else ""


def trained(model: dict[str, int]) -> str:
    """Trained parameters, and of how many, if there are more."""
    some, every = model["trainable_parameters"], model["parameters"]
    return f"{some:,}" if some == every else f"{some:,} of {every:,}"


def seeds_table(found: list[Configuration]) -> str:
    rows = [
        [
            cell(c.first.model), cell(c.first.config["dataset"]["name"]),
            f"{100 * c.first.share:g} %", str(len(c.runs)),
            f"**{100 * c.mean:.2f} %**", f"{100 * c.deviation:.2f} points",
            ", ".join(f"{100 * value:.2f}" for value in c.accuracies),
        ]
        for c in found
        if c.deviation is not None
    ]  # fmt: skip
    head = ["model", "dataset", "training images", "seeds", "mean test accuracy",
            "standard deviation", "single runs"]  # fmt: skip
    return table(head, rows) if rows else ""


def twins_table(found: list[Configuration], place: Path) -> str:
    """ViTs and their CNN twins, on equal epochs and on equal seconds."""
    rows = [
        [
            cell(vit.first.config["dataset"]["name"]), cell(vit.first.model), equal,
            *(cost(c) for c in (vit, cnn)), *(words.result(c) for c in (vit, cnn)),
        ]
        for equal, vit, cnn in sorted(twins(found, place), key=lambda pair: pair[0])
    ]  # fmt: skip
    head = ["dataset", "ViT", "equal", "cost of the ViT", "of the CNN", "test accuracy of the ViT",
            "of the CNN"]  # fmt: skip
    return table(head, rows) if rows else ""


def cost(c: Configuration) -> str:
    return f"{c.first.constants['EPOCHS']} epochs, {c.seconds:,.0f} s"


def pairs_table(found: list[Configuration], place: Path) -> str:
    """McNemar's tests, by set of test images."""
    parts = []
    for runs in chosen(found, place):
        data = runs[0].config["dataset"]["name"]
        rows = [
            [cell(p.one.model), cell(p.other.model), str(p.only_one), str(p.only_other),
             f"{p.p:.2g}", f"{p.p_holm:.2g}", cell(p.says)]
            for p in pairs(runs)
        ]  # fmt: skip
        head = ["one", "other", "only one right", "only other right", "p", "p (Holm)", "meaning"]
        images = runs[0].metrics["test_images"]
        parts.append(f"On {cell(data)} ({images:,} test images):\n\n{table(head, rows)}")
    return "\n".join(parts)


def efficiency_table(series: list[list[Configuration]]) -> str:
    """Test accuracy by share of the training images, a line a model."""
    shares = sorted({c.first.share for line in series for c in line})
    rows = []
    for line in series:
        by_share = {c.first.share: c for c in line}
        cells = [words.result(by_share[s]) if s in by_share else "" for s in shares]
        rows.append([cell(line[0].first.label), *cells])
    some = {c.first.share: words.images(c) for line in series for c in line}
    return table(["model", *(f"{100 * s:g} % ({some[s]})" for s in shares)], rows)


def score_table(looks: list[Run], to: Link) -> str:
    """What attention_viz.py --score found: of each model the map that validation finds best."""
    rows = []
    for look in looks:
        record = look.metrics()
        if "animal_share" not in record or not candidates(record):
            continue
        methods = record["methods"]
        name = max(candidates(record), key=lambda name: methods[name]["validation"])
        found = methods[name]["trained"]
        precision = found["average_precision"]
        rows.append([
            link(record["title"], look.folder, to), name, percent(precision["mean"]),
            points(precision[CENTER]), points(precision[RANDOM]), percent(found["iou"]["mean"]),
        ])  # fmt: skip
    head = ["model", "map", "average precision", "to the centre", "to random weights", "IoU"]
    return table(head, rows) if rows else ""


HEADLINE = {  # what README.md shows on its first screen
    "pets-3breeds-224-full-decay0.7-s0": "pretrained ViT-S/14, fine-tuned (three Pets breeds)",
    "pets-3breeds-224-scratch-s0": "the same ViT, trained from scratch",
    "cifar10-jpeg-vit_128x6-muon-small-first-s0": "small ViT, from scratch (CIFAR-10, JPEG copy)",
}


def headline_table(runs: list[Record], to: Link) -> str:
    """The runs of HEADLINE that are among `runs`, with their test accuracy and training time."""
    by_name = {run.folder.name: run for run in runs}
    rows = []
    for name, title in HEADLINE.items():
        if name in by_name:
            metrics = by_name[name].metrics
            low, high = (100 * bound for bound in metrics["test_accuracy_95"])
            rows.append(
                [
                    f"[{title}]({to(by_name[name].folder)}/)",
                    f"**{100 * metrics['test_accuracy']:.1f} %** ({low:.1f} to {high:.1f})",
                    f"{metrics['training_seconds'] / 60:.0f} minutes on one CPU core",
                ]
            )
    return table(["model", "test accuracy (95 % interval)", "training"], rows)


def sections(found: Found, place: Path, to: Link) -> dict[str, str]:
    """Every table by the name that a marker calls it."""
    plain = [run for run in found.runs if not run.sweep]
    whole = [run for run in plain if run.share == 1]
    found_configs = configurations(plain, place)
    made = {
        script.removesuffix(".py"): runs_table([r for r in whole if r.script == script], to)
        for script in TASKS
    }
    made["headline"] = headline_table(whole, to)
    made["seeds"] = seeds_table([c for c in found_configs if c.first.share == 1])
    made["twins"] = twins_table(found_configs, place)
    made["pairs"] = pairs_table(found_configs, place)
    lines = efficiencies(found_configs, place)
    made["efficiency"] = "\n".join(efficiency_table(series) for series in lines)
    made["attention"] = score_table(found.looks, to)
    made["sweeps"] = "\n".join(
        f"{link(folder.name, folder, to)}: {told['says']}\n" for folder, told in found.sweeps
    )
    return made


def fill(text: str, found: Found, place: Path, root: Path) -> str:
    """A page with the tables between its markers, `<!-- results: seeds -->`, made anew.

    Raises: UserError, for a marker that names no table.
    """
    made = sections(found, place, relative_to(root))

    def one(match: re.Match) -> str:
        if match[2] not in made:
            raise UserError(f"no table is called {match[2]!r}; there are {', '.join(made)}")
        return f"{match[1]}{made[match[2]]}{match[3]}"

    return MARKER.sub(one, text)


def relative_to(root: Path) -> Link:
    return lambda path: Path(os.path.relpath(path, root)).as_posix()


def page(content: dict[str, Any], found: Found, place: Path) -> str:
    """results/README.md: the report for those who read it on a code host."""
    made = sections(found, place, relative_to(place))
    titles = {
        **{script.removesuffix(".py"): task for script, task in TASKS.items()},
        "seeds": "Over seeds",
        "twins": "A ViT and a CNN of its size",
        "efficiency": "By share of the training images",
        "pairs": "Pairs of models on the same test images (McNemar's exact test)",
        "attention": "Where models look (`attention_viz.py --score`)",
        "sweeps": "Sweeps",
    }
    lines = [
        "# Results", "",
        f"Made by `python report.py`, {content['made']}. [report.html](report.html) shows the same "
        "and more: curves, confusion matrices, calibration, the hardest images. Runs in "
        "[official/](official/) come with the project.", "",
        *(f"- {cell(sentence)}" for sentence in content["summary"]), "",
    ]  # fmt: skip
    for name, title in titles.items():
        if made[name]:
            lines += [f"## {title}", "", made[name]]
    if found.left_out:
        lines += ["## Folders with a remark", ""]
        lines += [f"- {cell(folder.as_posix())}: {cell(why)}" for folder, why in found.left_out]
    return "\n".join(lines).rstrip() + "\n"
