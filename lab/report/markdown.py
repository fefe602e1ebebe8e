"""Tables of results in Markdown: for the README.md of a results folder, and between markers.

A marker is the line `<!-- results: seeds -->`. `fill` replaces what stands between it and the line
`<!-- end of results -->` by the table of that name.
"""

import re
from pathlib import Path
from typing import Any

from lab.attention import score_report
from lab.core import Run, UserError
from lab.report import folders, sentences
from lab.report.comparisons import (
    Configuration,
    compare_pairs,
    configurations,
    distinct_labels,
    efficiencies,
    on_most_images,
    select_models,
    twins,
)
from lab.report.records import TASKS, Found, Record

_MARKER = re.compile(r"(<!-- results: (\S+) -->\n).*?(<!-- end of results -->)", re.S)
_HEADLINES = {  # the runs on the first screen of the project's README
    "pets-3breeds-224-full-decay0.7-s0": "pretrained ViT-S/14, fine-tuned (three Pets breeds)",
    "pets-3breeds-224-scratch-s0": "the same ViT, trained from scratch",
    "cifar10-jpeg-vit_128x6-pretraining-muon": "small ViT, from scratch (CIFAR-10, JPEG copy)",
}
WRITTEN_BY = "Written by `python report.py`"  # only README.md files with this text are replaced
_TITLES = {
    **{script.removesuffix(".py"): task for script, task in TASKS.items()},
    "seeds": "Repeated runs (several seeds)",
    "twins": "ViTs and CNN twins",
    "efficiency": "Test accuracy by number of training images",
    "pairs": "Pairs of models on the same test images",
    "attention": "Attention maps (`attention_viz.py --score`)",
    "sweeps": "Sweeps",
}


def fill(text: str, found: Found, root: Path) -> str:
    """Fills the tables between the markers of a text.

    Args:
        text: Markdown with markers.
        found: the runs that the tables show.
        root: the folder that contains the text; links are relative to it.

    Raises: UserError for a marker that names no table.
    """
    tables = _tables(found, root)

    def replacement(match: re.Match) -> str:
        if match[2] not in tables:
            raise UserError(f"there is no table {match[2]!r}; choose one of {', '.join(tables)}")
        return f"{match[1]}{tables[match[2]]}{match[3]}"

    return _MARKER.sub(replacement, text)


def results_page(content: dict[str, Any], found: Found) -> str:
    """The README.md of a results folder: the main tables of the report as text."""
    tables = _tables(found, found.place)
    lines = [
        "# Results", "",
        f"{WRITTEN_BY} on {content['made']}. [report.html](report.html) also "
        "shows learning curves, confusion matrices, calibration and the hardest images.", "",
        *(f"- {escape(sentence)}" for sentence in content["summary"]), "",
    ]  # fmt: skip
    for name, title in _TITLES.items():
        if tables[name]:
            lines += [f"## {title}", "", tables[name]]
    if found.left_out:
        lines += ["## Folders with problems", ""]
        lines += [f"- {escape(folder.as_posix())}: {escape(why)}" for folder, why in found.left_out]
    return "\n".join(lines).rstrip() + "\n"


def escape(text: str) -> str:
    """Escapes text so that Markdown shows it verbatim, on one line, inside a table cell.

    Underscores inside a word stay as they are, because they are not markup there.
    """
    text = re.sub(r"([|\\\[\]<>`*~$&])", r"\\\1", " ".join(text.split()))
    return re.sub(r"(?<!\w)_|_(?!\w)", r"\\_", text)


def _tables(found: Found, root: Path) -> dict[str, str]:
    """All tables by name, with links relative to `root`; "" where there is nothing to show."""
    configs = configurations(run for run in found.runs if not run.sweep)
    on_most = on_most_images(configs)
    full = [run for c in on_most for run in c.runs]
    tables = {
        script.removesuffix(".py"): _runs_table([r for r in full if r.script == script], root)
        for script in TASKS
    }
    tables["headline"] = _headline_table(full, root)
    tables["seeds"] = _seeds_table([c for c in on_most if c.std is not None])
    tables["twins"] = _twins_table(configs)
    tables["pairs"] = _pairs_table(configs)
    tables["efficiency"] = "\n".join(map(_efficiency_table, efficiencies(configs)))
    tables["attention"] = _attention_table(found.attention_runs, root)
    tables["sweeps"] = "\n".join(
        f"{_linked(folder.name, folder, root)}: {escape(record['says'])}\n"
        for folder, record in found.sweeps
    )
    return tables


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table, whose cells are Markdown; "" without rows."""
    lines = [head, ["---"] * len(head), *rows] if rows else []
    return "".join(f"| {' | '.join(cells)} |\n" for cells in lines)


def _linked(name: str, folder: Path, root: Path) -> str:
    return f"[{escape(name)}]({folders.link(folder, root)}/)"


def _runs_table(runs: list[Record], root: Path) -> str:
    """Finished runs, one per line."""
    rows = []
    for run in sorted((r for r in runs if r.metrics), key=lambda r: r.folder.as_posix()):
        m, model = run.metrics, run.config["model"]
        low, high = (100 * value for value in m["test_accuracy_95"])
        memory = m.get("peak_memory_mb")
        trained, total = model["trainable_parameters"], model["parameters"]
        rows.append([
            _linked(run.folder.name, run.folder, root),
            f"{trained:,}" if trained == total else f"{trained:,} of {total:,}",
            f"{model['macs'] / 1e6:,.1f}M", f"{m['epochs']}",
            f"**{100 * m['test_accuracy']:.2f} %** ({low:.1f} to {high:.1f}, "
            f"{sentences.plural(m['test_images'], 'image')})",
            f"{m['training_seconds']:,.0f} s" if run.timing_is_valid else "",
            f"{m['images_per_second']:,}" if run.timing_is_valid else "",
            f"{memory:,} MB" if memory else "",
        ])  # fmt: skip
    head = ["run", "trained parameters", "MACs per image", "epochs",
            "test accuracy (95 % interval)", "training time", "images/s",
            "peak memory"]  # fmt: skip
    return table(head, rows)


def _seeds_table(configs: list[Configuration]) -> str:
    """Configurations with several seeds."""
    datasets = [
        c.first.config["dataset"]["name"] + f", {100 * c.first.share:g} %" * (c.first.share < 1)
        for c in configs
    ]
    labels = distinct_labels(
        (c.first.model, dataset, c.name) for c, dataset in zip(configs, datasets, strict=True)
    )
    rows = [
        [
            escape(label), escape(dataset), str(len(c.runs)),
            f"**{100 * c.mean:.2f} %**", f"{100 * c.std:.2f} points",
            ", ".join(f"{100 * value:.2f}" for value in c.accuracies),
        ]
        for c, label, dataset in zip(configs, labels, datasets, strict=True)
    ]  # fmt: skip
    head = ["model", "dataset", "seeds", "mean test accuracy", "standard deviation",
            "test accuracy per seed (%)"]  # fmt: skip
    return table(head, rows)


def _twins_table(configs: list[Configuration]) -> str:
    """ViTs and their CNN twins, with an equal number of epochs or equal training time."""

    def cost(c: Configuration) -> str:
        epochs = sentences.plural(c.first.constants["EPOCHS"], "epoch")
        return f"{epochs}, {c.seconds:,.0f} s" if c.timing_is_valid else epochs

    budgets = {"epochs": "same epochs", "seconds": "same training time"}
    pairs = sorted(twins(configs), key=lambda pair: pair[0])
    labels = distinct_labels(
        (vit.first.model, f"{vit.first.config['dataset']['name']}, {equal}",
         f"{vit.name}, {cnn.name}")
        for equal, vit, cnn in pairs
    )  # fmt: skip
    rows = [
        [
            escape(vit.first.config["dataset"]["name"]), escape(label), budgets[equal],
            cost(vit), cost(cnn), sentences.result(vit), sentences.result(cnn),
        ]
        for (equal, vit, cnn), label in zip(pairs, labels, strict=True)
    ]  # fmt: skip
    head = ["dataset", "ViT", "budget", "training of the ViT", "training of the CNN",
            "test accuracy of the ViT", "test accuracy of the CNN"]  # fmt: skip
    return table(head, rows)


def _pairs_table(configs: list[Configuration]) -> str:
    """McNemar's tests, by test set."""
    parts = []
    for runs in select_models(configs):
        rows = [
            [escape(f"{p.a.model} ({p.a.recipe})"), escape(f"{p.b.model} ({p.b.recipe})"),
             str(p.only_a), str(p.only_b),
             f"{p.p:.2g}", f"{p.p_holm:.2g}", escape(sentences.pair_sentence(p))]
            for p in compare_pairs(runs)
        ]  # fmt: skip
        head = ["model A", "model B", "only A correct", "only B correct", "p", "p (Holm)", "result"]
        name = escape(runs[0].test_set)
        parts.append(f"McNemar's exact test on {name}:\n\n{table(head, rows)}")
    return "\n".join(parts)


def _efficiency_table(series: list[list[Configuration]]) -> str:
    """Test accuracy by fraction of the training images, one line per model."""
    images = {c.first.share: sentences.images(c) for line in series for c in line}
    labels = distinct_labels((line[-1].first.label, "", line[-1].name) for line in series)
    rows = []
    for line, label in zip(series, labels, strict=True):
        by_share = {c.first.share: sentences.result(c) for c in line}
        rows.append([escape(label), *(by_share.get(s, "") for s in sorted(images))])
    head = ["model", *(f"{100 * s:g} % ({images[s]} images)" for s in sorted(images))]
    return table(head, rows)


def _attention_table(runs: list[Run], root: Path) -> str:
    """Scores by attention_viz.py --score: for each model, the map that is best on validation."""
    percent, points = score_report.percent, score_report.points
    rows = []
    for run in runs:
        record = run.metrics()
        names = score_report.candidates(record) if "animal_share" in record else []
        if not names:
            continue
        name = max(names, key=lambda name: record["methods"][name]["validation"])
        scores = record["methods"][name][score_report.TRAINED]
        precision = scores["average_precision"]
        rows.append([
            _linked(record["title"], run.folder, root), escape(name), percent(precision["mean"]),
            points(precision[score_report.CENTER]), points(precision[score_report.RANDOM]),
            percent(scores["iou"]["mean"]),
        ])  # fmt: skip
    head = ["model", "best map on validation", "average precision (%)",
            "gain over a center Gaussian", "gain over random weights", "IoU (%)"]  # fmt: skip
    return table(head, rows)


def _headline_table(runs: list[Record], root: Path) -> str:
    """The runs of _HEADLINES that are among `runs`, with test accuracy and training time."""
    by_name = {run.folder.name: run for run in runs if run.metrics}
    rows = []
    for name, description in _HEADLINES.items():
        if name in by_name:
            run, metrics = by_name[name], by_name[name].metrics
            threads = run.config["hardware"]["threads"]
            cores = "one CPU core" if threads == 1 else f"{threads} CPU cores"
            low, high = (100 * bound for bound in metrics["test_accuracy_95"])
            rows.append([
                _linked(description, run.folder, root),
                f"**{100 * metrics['test_accuracy']:.1f} %** ({low:.1f} to {high:.1f})",
                f"{metrics['training_seconds'] / 60:.0f} minutes on {cores}"
                if run.timing_is_valid else "",
            ])  # fmt: skip
    return table(["model", "test accuracy (95 % interval)", "training"], rows)
