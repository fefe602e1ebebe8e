"""Every mode of fine-tuning, one process after another, then a picture and a table of all."""

import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt

from lab.core import Run, checkpoints, plots, runtime
from lab.finetuning.modes import mode_label


def compare_modes(modes: list[list[str]], place: Path) -> None:
    """Runs this script once a mode and compares what came out.

    Each mode has a process of its own: peak memory is that of the process, and what one mode
    leaves in memory must not count for the next.

    Args:
        modes: for each, the words behind `--mode`.
        place: where the comparison goes, beside the runs' folders.

    Raises: SystemExit with the status of a mode that failed or was stopped; the same command goes
        on there.
    """
    if runtime.process_state().num_processes > 1:
        raise SystemExit("--mode all starts processes of its own: run it with python")
    rows, names = [], []
    for words in modes:
        command = [sys.executable, *sys.argv, "--mode", *words]
        print(f"\n--- {' '.join(words)} ---", flush=True)
        runs = []  # one a seed
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                for line in process.stdout:
                    print(line, end="", flush=True)
                    if line.endswith("curves.png\n"):
                        runs.append(Run(Path(line.strip()).parent))
            except KeyboardInterrupt:  # the process got it too, and saves itself
                process.wait()
        if process.returncode:
            raise SystemExit(process.returncode)
        rows.append(row_of(runs))
        names.append(runs[0].folder.name)
    title = names[0].replace(f"-{rows[0]['mode']}", "")
    picture = place / f"{title}-modes.png"
    draw(picture, rows, title)
    lines = table(rows)
    checkpoints.write_atomically(
        picture.with_suffix(".md"), lambda scratch: scratch.write_text(lines)
    )
    print(f"\n{lines}\n{picture.with_suffix('.md')}\n{picture}")


def row_of(runs: list[Run]) -> dict[str, Any]:
    """What the finished runs of a mode, one a seed, say of it."""
    metrics = [run.metrics() for run in runs]
    config = runs[0].config()
    accuracies = [m["test_accuracy"] for m in metrics]
    mean = statistics.mean(accuracies)
    if len(runs) == 1:
        (low, high), around = metrics[0]["test_accuracy_95"], "95 % interval"
    else:
        deviation = statistics.stdev(accuracies)
        low, high = mean - deviation, mean + deviation
        around = f"mean of {len(runs)} seeds and standard deviation"
    return {
        "mode": mode_label(config["constants"]),
        "accuracy": 100 * mean,
        "low": 100 * low,
        "high": 100 * high,
        "around": around,
        "trainable": config["model"]["trainable_parameters"],
        "seconds": statistics.mean(m["training_seconds"] for m in metrics),
        "memory": max(m["peak_memory_mb"] or 0 for m in metrics),
        "images": metrics[0]["test_images"],
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        f"| mode | trainable parameters | test accuracy ({rows[0]['around']}) | seconds "
        "| peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['mode']} | {r['trainable']:,} | {r['accuracy']:.1f} % ({r['low']:.1f} to "
        f"{r['high']:.1f}) | {r['seconds']:,.0f} s | {r['memory']:,} MB |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """The fine-tuning curve: one line of the picture a mode, one panel a quantity."""
    figure, axes = plt.subplots(
        1, 4, figsize=(15, 1.6 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    places = range(len(rows))
    accuracy = [row["accuracy"] for row in rows]
    around = [[r["accuracy"] - r["low"] for r in rows], [r["high"] - r["accuracy"] for r in rows]]
    axes[0].errorbar(
        accuracy, places, xerr=around, fmt="o", color=plots.VAL_COLOR, capsize=3, lw=1.6
    )
    for place, value in zip(places, accuracy, strict=True):
        axes[0].annotate(f"{value:.1f}", (value, place), (0, 6), textcoords="offset points",
                         ha="center", fontsize=9)  # fmt: skip
    axes[0].set_yticks(places, [row["mode"] for row in rows])
    axes[0].set_xlabel(f"test accuracy (%), {rows[0]['around']}\n{rows[0]['images']:,} test images")
    for axis, key, label in (
        (axes[1], "trainable", "trainable parameters (logarithmic)"),
        (axes[2], "seconds", "training (seconds)"),
        (axes[3], "memory", "peak memory of the process (MB)"),
    ):
        values = [row[key] for row in rows]
        bars = axis.barh(
            places, values, color=plots.TRAIN_COLOR, height=0.62, log=key == "trainable"
        )
        axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=9)
        axis.set_xlabel(label)
        axis.margins(x=0.45 if key == "trainable" else 0.3)
    for axis in axes:
        axis.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()  # the first mode on top; the panels share the axis
    axes[0].margins(y=0.08)
    figure.suptitle(f"How much must be trained? {title}")
    plots.save_figure(figure, path)
