"""Runs every mode of fine-tuning in its own process, and compares them in a figure and a table."""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from lab.core import Run, UserError, checkpoints, child, constants, runtime
from lab.finetuning.modes import mode_label


def compare_modes(
    modes: dict[str, dict[str, Any]], name: str | None, results_dir: Path, suffix: str = ""
) -> None:
    """Runs this script once per mode and compares the results.

    Each mode has its own process, because peak memory is measured per process and must not depend
    on the modes before it. After an interruption, the same command resumes.

    Args:
        modes: maps the short name of each mode, used in its run's folder, to the constants that it
            sets.
        name: the first part of the names of the runs; None: as the script names them.
        results_dir: the folder of the runs; the comparison is written there, too.
        suffix: of the comparison's name, for options that the first mode ignores.

    Raises: Stopped, after a signal; SystemExit with the status of a mode that failed; UserError,
        under a launcher.
    """
    if runtime.process_state().num_processes > 1:
        raise UserError("--mode all starts its own processes: run it with python, not a launcher")
    rows, folders = [], []
    for number, (mode, values) in enumerate(modes.items(), 1):
        print(f"\n--- {mode} ({number} of {len(modes)}) ---", flush=True)
        flags = constants.as_flags({**values, "NAME": name and f"{name}-{mode}"})
        runs = _run_mode(flags, f"mode {mode}, {number} of {len(modes)}")
        rows.append(row_of(runs))
        folders.append(runs[0].folder.name)
    title = _without_mode(folders[0], next(iter(modes))) + suffix
    figure = results_dir / f"{title}-modes.png"
    _draw(figure, rows, title)
    table = _table(rows)
    checkpoints.write_atomically(figure.with_suffix(".md"), lambda path: path.write_text(table))
    print(f"\n{table}\n{figure.with_suffix('.md')}\n{figure}")


def _without_mode(folder: str, mode: str) -> str:
    """The name of a mode's run without the mode, which a dataset's name may contain as well."""
    before, _, after = folder.rpartition(f"-{mode}")
    return before + after


def _run_mode(flags: list[str], where: str) -> list[Run]:
    """Runs this script with more flags in another process; returns its runs, one per seed."""
    with tempfile.TemporaryDirectory() as scratch:
        folders = Path(scratch, "folders")
        environment = {**os.environ, Run.FOLDERS_VARIABLE: str(folders)}
        words = [sys.executable, *sys.argv, *flags]
        if status := child.run_child(words, where, env=environment):
            raise SystemExit(status)
        return [Run(Path(line)) for line in folders.read_text(encoding="utf-8").splitlines()]


def row_of(runs: list[Run]) -> dict[str, Any]:
    """The results of a mode's finished runs, one per seed."""
    metrics = [run.metrics() for run in runs]
    config = runs[0].config()
    accuracies = [m["test_accuracy"] for m in metrics]
    mean = statistics.mean(accuracies)
    if len(runs) == 1:
        (low, high), error_bar = metrics[0]["test_accuracy_95"], "95 % interval"
    else:
        deviation = statistics.stdev(accuracies)
        low, high = mean - deviation, mean + deviation
        error_bar = f"mean of {len(runs)} seeds and standard deviation"
    return {
        "mode": mode_label(config["constants"]),
        "accuracy": 100 * mean,
        "low": 100 * low,
        "high": 100 * high,
        "error_bar": error_bar,
        "trainable": config["model"]["trainable_parameters"],
        "seconds": statistics.mean(m["training_seconds"] for m in metrics),
        "memory": max(m["peak_memory_mb"] or 0 for m in metrics),  # 0: not measured
        "images": metrics[0]["test_images"],
    }


def _memory(megabytes: int) -> str:
    return f"{megabytes:,} MB" if megabytes else "not measured"


def _table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown."""
    lines = [
        f"| mode | trainable parameters | test accuracy ({rows[0]['error_bar']}) | seconds "
        "| peak memory |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {r['mode']} | {r['trainable']:,} | {r['accuracy']:.1f} % ({r['low']:.1f} to "
        f"{r['high']:.1f}) | {r['seconds']:,.0f} s | {_memory(r['memory'])} |"
        for r in rows
    ]
    return "\n".join(lines) + "\n"


def _draw(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Draws accuracy, trainable parameters, time and memory side by side, one line per mode."""
    from lab.core import plots  # loads matplotlib

    figure, axes = plots.plt.subplots(
        1, 4, figsize=(15, 2.2 + 0.42 * len(rows)), sharey=True, layout="constrained"
    )
    places = range(len(rows))
    accuracy = [row["accuracy"] for row in rows]
    errors = [[r["accuracy"] - r["low"] for r in rows], [r["high"] - r["accuracy"] for r in rows]]
    test = plots.SPLITS["test"]
    axes[0].errorbar(accuracy, places, xerr=errors, fmt=test.marker, color=test.color, capsize=3,
                     lw=1.6)  # fmt: skip
    for place, value in zip(places, accuracy, strict=True):
        axes[0].annotate(f"{value:.1f}", (value, place), (0, 6), textcoords="offset points",
                         ha="center", fontsize=9)  # fmt: skip
    axes[0].set_yticks(places, [row["mode"] for row in rows])
    axes[0].set_xlabel("test accuracy (%)")
    for axis, key, label in (
        (axes[1], "trainable", "trainable parameters (log scale)"),
        (axes[2], "seconds", "training time (s)"),
        (axes[3], "memory", "peak memory of the process (MB)"),
    ):
        values = [row[key] for row in rows]
        if key == "trainable":  # the length of a bar means nothing on a logarithmic axis
            axis.set_xscale("log")
            axis.plot(values, places, "D", color=plots.TRAIN_COLOR)
            for place, value in zip(places, values, strict=True):
                axis.annotate(f"{value:,}", (value, place), (8, 0), textcoords="offset points",
                              va="center", fontsize=9)  # fmt: skip
            axis.set_xlim(min(values) / 2, max(values) * 12)
        else:
            bars = axis.barh(places, values, color=plots.TRAIN_COLOR, height=0.55)
            axis.bar_label(bars, [f"{value:,.0f}" for value in values], padding=3, fontsize=9)
            axis.margins(x=0.3)
        axis.set_xlabel(label)
    for axis in axes:
        axis.grid(axis="x", alpha=0.25)
    axes[0].invert_yaxis()  # the first mode on top; the panels share the axis
    axes[0].margins(x=0.12, y=0.12)
    best = max(rows, key=lambda row: row["accuracy"])
    near = [row for row in rows if row["high"] >= best["low"]]
    cheap = min(near, key=lambda row: row["trainable"])
    finding = f"{best['mode']} has the highest test accuracy ({best['accuracy']:.1f} %)"
    if cheap["trainable"] < best["trainable"]:
        share = cheap["trainable"] / best["trainable"]
        finding += (f"; {cheap['mode']} reaches {cheap['accuracy']:.1f} % within overlapping error "
                    f"bars, with {100 * share:.3g} % of the trainable parameters")  # fmt: skip
    finding = finding[0].upper() + finding[1:]
    note = f"{title}, {rows[0]['images']:,} test images; error bars: {rows[0]['error_bar']}."
    plots.set_title(figure, finding, note)
    plots.save_figure(figure, path)
