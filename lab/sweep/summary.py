"""What a sweep found: sweep.json, a paragraph, a table and plots."""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from matplotlib.ticker import LogLocator, NullLocator
from optuna.distributions import CategoricalDistribution
from optuna.trial import TrialState

from lab.core import Run, UserError, checkpoints, plots, stats
from lab.sweep.search_space import Space, format_value

_STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
_MIN_TRIALS = 10  # finished trials needed to estimate importance
_MIN_TREND = 0.3  # Spearman's correlation; a weaker one is not called a trend
_MIN_R2 = 0.1  # of a random forest on trials that it was not trained on; below, importance is noise

Record = dict[str, Any]  # the content of sweep.json


def write_summary(folder: Path, study: optuna.Study, space: Space, num_trials: int) -> Record:
    """Writes sweep.json and sweep.md. Returns: the content of sweep.json."""
    config = Run(folder).config()
    trials = [
        {"number": trial.number, "state": _STATES[trial.state], "params": trial.params,
         **trial.user_attrs["result"]}
        for trial in study.get_trials(deepcopy=False) if trial.state in _STATES
    ]  # fmt: skip
    record = {**config, "asked": num_trials, "trials": trials, "best": None}
    record |= importance(study, space, config["constants"]["SEED"])
    if done := _finished(record):
        best = max(done, key=lambda trial: (trial["val_accuracy"], -trial["number"]))
        record |= {"best": best["number"], **_accuracies(folder / best["folder"])}
    record["says"] = describe(record)
    checkpoints.write_json(folder / "sweep.json", record)
    text = f"# {folder.name}\n\n{record['says']}\n\n{_table(record)}"
    table = folder / "sweep.md"
    checkpoints.write_atomically(table, lambda path: path.write_text(text, encoding="utf-8"))
    return record


def importance(study: optuna.Study, space: Space, seed: int) -> dict[str, Any]:
    """How much of the variance in validation accuracy each parameter explains, by fANOVA.

    fANOVA (Hutter et al. 2014) finds importance even in noise. A random forest is therefore tested
    on trials that it was not trained on (out-of-bag R2).

    Returns: "importance" of each parameter, {} if it would be noise; "interactions", the fraction
        of the variance that no single parameter explains; and "predicted", the R2.
    """
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    values = np.array([trial.value for trial in done])
    if len(done) < _MIN_TRIALS or len(space) < 2 or np.ptp(values) == 0:
        return {"importance": {}, "interactions": None, "predicted": None}
    # Sweeps of few trials do without these imports, which take over a second.
    from optuna.importance import FanovaImportanceEvaluator
    from sklearn.ensemble import RandomForestRegressor

    points = [[space[name].to_internal_repr(t.params[name]) for name in space] for t in done]
    seed %= 2**32  # the largest that scikit-learn accepts, plus one
    forest = RandomForestRegressor(200, oob_score=True, random_state=seed).fit(points, values)
    r2 = round(float(forest.oob_score_), 4)
    evaluator = FanovaImportanceEvaluator(seed=seed)
    shares = evaluator.evaluate(study, target=lambda trial: 100 * trial.value)
    total = sum(shares.values())
    is_noise = r2 < _MIN_R2 or total == 0
    known = {} if is_noise else {name: round(share / total, 4) for name, share in shares.items()}
    return {"importance": known, "interactions": round(max(0, 1 - total), 4), "predicted": r2}


def describe(record: Record) -> str:
    """A paragraph about a sweep, from its record."""
    states = [trial["state"] for trial in record["trials"]]
    counts = [f"{states.count(s)} {s.replace('complete', 'finished')}" for s in _STATES.values()]
    text = f"{record['asked']} trials of {record['constants']['SCRIPT']}: {', '.join(counts)}."
    if record["best"] is None:
        return text
    best = next(trial for trial in record["trials"] if trial["number"] == record["best"])
    params = ", ".join(f"{name} {format_value(value)}" for name, value in best["params"].items())
    done = [trial["val_accuracy"] for trial in _finished(record)]
    near = sum(accuracy >= record["val_accuracy_95"][0] for accuracy in done)
    shares = [f"{name} {100 * share:.0f} %" for name, share in record["importance"].items()]
    text += (f" Trial {best['number']} ({params}) has the best validation accuracy, "
             f"{_accuracy(record, 'val')}.")  # fmt: skip
    if len(done) > 1:
        text += (
            f" This accuracy is optimistically biased, because it is the best of {len(done)} "
            f"trials. The interval contains {near} of the {len(done)} finished trials."
        )
    if shares:
        text += (
            f" {next(iter(record['importance']))} matters most. Importance by fANOVA: "
            f"{', '.join(shares)}; interactions explain {100 * record['interactions']:.0f} % of "
            "the variance of the forest's predictions. This random forest predicts unseen trials "
            f"with an R² of {record['predicted']:.2f}."
        )
    elif record["predicted"] is not None:
        text += (" Importance is not shown because it would be noise: a random forest predicts "
                 f"unseen trials with an R² of only {record['predicted']:.2f}.")  # fmt: skip
    elif len(best["params"]) > 1:
        text += f" Importance needs {_MIN_TRIALS} finished trials with different accuracies."
    return (f"{text} On the test images, trial {best['number']} reaches "
            f"{_accuracy(record, 'test')}. The test accuracy of the other trials is not shown, "
            "because it must not influence the choice.")  # fmt: skip


def draw_plots(folder: Path, record: Record, space: Space) -> None:
    """Draws parallel.png, importance.png and a plot for each parameter."""
    if not (done := _finished(record)):
        return
    num_pruned = sum(trial["state"] == "pruned" for trial in record["trials"])
    note = f"{len(done)} finished trials" + f" ({num_pruned} pruned, not shown)" * bool(num_pruned)
    _plot_parallel(folder / "parallel.png", record, space, note)
    for name in space:
        _plot_parameter(folder / f"{name.lower()}.png", record, name, space, note)
    if record["importance"]:
        _plot_importance(folder / "importance.png", record, note)


def _positions(done: list[Record], name: str, space: Space) -> tuple[list[float], list[str] | None]:
    """Where a parameter's values lie on an axis, and the labels of 0, 1, ... for categories."""
    values = [trial["params"][name] for trial in done]
    if not isinstance(space[name], CategoricalDistribution):
        return values, None
    choices = space[name].choices
    return [choices.index(value) for value in values], [format_value(c) for c in choices]


def _plot_parallel(path: Path, record: Record, space: Space, note: str) -> None:
    """One line per trial through an axis per parameter; the last axis is validation accuracy."""
    done = _finished(record)
    accuracy = [100 * trial["val_accuracy"] for trial in done]
    figure, axis = plt.subplots(figsize=(3 + 2 * len(space), 4.8), layout="constrained")
    columns = []
    for place, name in enumerate([*space, None]):
        values, labels = _positions(done, name, space) if name else (accuracy, None)
        is_log = name and getattr(space[name], "log", False)
        heights = np.log(values) if is_log else np.array(values, float)
        low, high = (0, len(labels) - 1) if labels else (heights.min(), heights.max())
        columns.append((heights - low) / (high - low) if high > low else np.full(len(done), 0.5))
        ticks = [(0, f"{min(values):.4g}"), (1, f"{max(values):.4g}")]
        if labels:
            ticks = [(i / max(1, len(labels) - 1), text) for i, text in enumerate(labels)]
        for height, text in ticks:
            axis.text(place - 0.04, height, text, ha="right", va="center", fontsize=9,
                      bbox={"fc": "white", "ec": "none", "alpha": 0.8, "pad": 1})  # fmt: skip
        axis.axvline(place, color="gray", lw=0.8, zorder=0)
    lines = np.stack(columns, 1)
    best = next(i for i, trial in enumerate(done) if trial["number"] == record["best"])
    shades = plt.get_cmap("viridis_r")(lines[:, -1])
    for i in np.argsort(accuracy):
        axis.plot(lines[i], color=shades[i], lw=3 if i == best else 1.2)
    axis.set_xticks(range(len(space) + 1), [*space, "validation accuracy (%)"])
    axis.set(yticks=[], xlim=(-0.5, len(space) + 0.2))
    axis.spines[:].set_visible(False)
    best_params = ", ".join(f"{name} {_short(v)}" for name, v in done[best]["params"].items())
    finding = f"The best trial reaches {accuracy[best]:.1f} % with {best_params}"
    plots.set_title(figure, finding, f"{note}. The thick line is the best trial.")
    plots.save_figure(figure, path)


def _plot_parameter(path: Path, record: Record, name: str, space: Space, note: str) -> None:
    """Validation accuracy against one parameter."""
    done = _finished(record)
    accuracy = np.array([100 * trial["val_accuracy"] for trial in done])
    values, labels = _positions(done, name, space)
    style = plots.SPLITS["validation"]
    figure, axis = plt.subplots(figsize=(7, 4.8), layout="constrained")
    low, high = (100 * end for end in record["val_accuracy_95"])
    axis.axhspan(low, high, color=style.color, alpha=0.12, lw=0, label="95 % interval of the best")
    axis.plot(values, accuracy, style.marker, color=style.color, alpha=0.7, label="one trial")
    best = next(i for i, trial in enumerate(done) if trial["number"] == record["best"])
    axis.plot(values[best], accuracy[best], "*", color="black", ms=13, label="best trial")
    if labels:
        axis.set_xticks(range(len(labels)), labels)
        axis.set_xlim(-0.5, len(labels) - 0.5)
        medians = {text: np.median(accuracy[np.array(values) == i])
                   for i, text in enumerate(labels) if i in values}  # fmt: skip
        first = max(medians, key=medians.__getitem__)
        finding = f"{name} {first} has the highest median accuracy ({medians[first]:.1f} %)"
    else:
        if getattr(space[name], "log", False):
            axis.set_xscale("log")
            is_wide = max(values) > 100 * min(values)
            axis.xaxis.set_major_locator(LogLocator(subs=(1,) if is_wide else (1, 2, 5)))
            axis.xaxis.set_major_formatter("{x:g}")
            axis.xaxis.set_minor_locator(NullLocator())
        trend = _rank_correlation(values, accuracy)
        direction = "higher" if trend > 0 else "lower"
        finding = f"A higher {name} tends to give a {direction} validation accuracy"
        if abs(trend) < _MIN_TREND:
            finding = f"{name} shows no monotonic trend"
        finding += f" (rank correlation {trend:+.2f})"
    axis.set(xlabel=name, ylabel="validation accuracy (%)")
    axis.grid(alpha=0.25)
    plots.legend_above(axis, 3)
    plots.set_title(figure, finding, note)
    plots.save_figure(figure, path)


def _plot_importance(path: Path, record: Record, note: str) -> None:
    names = sorted(record["importance"], key=record["importance"].__getitem__)
    shares = [100 * record["importance"][name] for name in names]
    figure, axis = plt.subplots(figsize=(7, 1.8 + 0.5 * len(names)), layout="constrained")
    bars = axis.barh(names, shares, color=plots.VAL_COLOR, height=0.55)
    axis.bar_label(bars, [f"{share:.0f} %" for share in shares], padding=4)
    axis.set(xlabel="share of the variance explained by single parameters (%)")
    axis.set_xlim(0, 1.15 * max(shares))
    text = (f"fANOVA on {note}. The random forest predicts unseen trials with an R² of "
            f"{record['predicted']:.2f}; importance covers only the variance that the forest "
            "explains.")  # fmt: skip
    plots.set_title(figure, f"{names[-1]} matters most", text)
    plots.save_figure(figure, path)


def _rank_correlation(values: list[float], accuracy: np.ndarray) -> float:
    """Spearman's correlation; 0 if either side is constant."""
    if len(set(values)) < 2 or np.ptp(accuracy) == 0:
        return 0.0
    from scipy.stats import spearmanr

    return float(spearmanr(values, accuracy).statistic)


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else format_value(value)


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _finished(record: Record) -> list[Record]:
    return [trial for trial in record["trials"] if trial["state"] == "complete"]


def _accuracies(folder: Path) -> dict[str, Any]:
    """Validation and test accuracy of the best run, with 95 % intervals."""
    try:
        metrics, images = Run(folder).metrics(), Run(folder).config()["dataset"]["val"]
    except UserError as error:
        raise UserError(
            f"the records of the best trial are missing or damaged: restore {folder}"
        ) from error
    low, high = stats.wilson_interval(round(metrics["val_accuracy"] * images), images)
    known = ("val_accuracy", "test_images", "test_accuracy", "test_accuracy_95")
    return {**{key: metrics[key] for key in known}, "val_images": images,
            "val_accuracy_95": [round(low, 4), round(high, 4)]}  # fmt: skip


def _accuracy(record: Record, split: str) -> str:
    low, high = (100 * end for end in record[f"{split}_accuracy_95"])
    accuracy, images = percent(record[f"{split}_accuracy"]), record[f"{split}_images"]
    return f"{accuracy} of {images:,} images (95 % interval {low:.1f} to {high:.1f})"


def _table(record: Record) -> str:
    """The trials by validation accuracy, the command and the plots, in Markdown."""
    trials = sorted(record["trials"], key=lambda t: (-(t["val_accuracy"] or -1), t["number"]))
    names = list(trials[0]["params"]) if trials else []
    head = ["trial", *names, "validation accuracy", "epochs", "seconds", "state"]
    rows = [head, ["---"] * len(head)] if trials else []
    for trial in trials:
        state = f"failed: {trial['error']}" if trial["error"] else trial["state"]
        rows.append([
            f"[{trial['number']}]({trial['folder']}/)" if trial["folder"] else trial["number"],
            *map(format_value, trial["params"].values()),
            "" if trial["val_accuracy"] is None else percent(trial["val_accuracy"]),
            trial["epochs"], trial["seconds"],
            "**best**" if trial["number"] == record["best"] else state.replace("|", "/"),
        ])  # fmt: skip
    lines = [*(f"| {' | '.join(map(str, row))} |" for row in rows), "", f"`{record['command']}`"]
    if record["best"] is not None:
        shown = ["parallel", *["importance"] * bool(record["importance"]), *map(str.lower, names)]
        lines += ["", *(f"![]({name}.png)" for name in shown)]
    return "\n".join(lines) + "\n"
