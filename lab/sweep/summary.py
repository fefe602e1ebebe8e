"""What a sweep found: sweep.json, a paragraph, a table and plots."""

import warnings
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import optuna
from optuna.distributions import CategoricalDistribution
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import TrialState
from optuna.visualization import matplotlib as optuna_plots
from sklearn.ensemble import RandomForestRegressor

from lab.core import Run, UserError, checkpoints, plots, stats
from lab.sweep.search_space import Space, show

STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
MIN_TRIALS = 10  # finished ones that importance needs
MIN_R2 = 0.1  # of a random forest on trials that it was not trained on; below, importance is noise

Record = dict[str, Any]  # the content of sweep.json


def write_summary(folder: Path, study: optuna.Study, space: Space, num_trials: int) -> Record:
    """Writes sweep.json and sweep.md. Returns: the content of sweep.json."""
    config = Run(folder).config()
    trials = [
        {"number": trial.number, "state": STATES[trial.state], "params": trial.params,
         **trial.user_attrs["result"]}
        for trial in study.get_trials(deepcopy=False) if trial.state in STATES
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

    Returns: "importance" of each parameter, {} if it would be noise; "interactions", the share of
        the variance that no single parameter explains; and "predicted", the R2.
    """
    done = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    values = np.array([trial.value for trial in done])
    if len(done) < MIN_TRIALS or len(space) < 2 or np.ptp(values) == 0:
        return {"importance": {}, "interactions": None, "predicted": None}
    points = [[space[name].to_internal_repr(t.params[name]) for name in space] for t in done]
    forest = RandomForestRegressor(200, oob_score=True, random_state=seed).fit(points, values)
    r2 = round(float(forest.oob_score_), 4)
    evaluator = FanovaImportanceEvaluator(seed=seed)
    shares = evaluator.evaluate(study, target=lambda trial: 100 * trial.value)
    total = sum(shares.values())
    is_noise = r2 < MIN_R2 or total == 0
    known = {} if is_noise else {name: round(share / total, 4) for name, share in shares.items()}
    return {"importance": known, "interactions": round(max(0, 1 - total), 4), "predicted": r2}


def describe(record: Record) -> str:
    """A paragraph about a sweep, from its record."""
    states = [trial["state"] for trial in record["trials"]]
    counts = [f"{states.count(s)} {s.replace('complete', 'finished')}" for s in STATES.values()]
    text = f"{record['asked']} trials of {record['constants']['SCRIPT']}: {', '.join(counts)}."
    if record["best"] is None:
        return text
    best = next(trial for trial in record["trials"] if trial["number"] == record["best"])
    params = ", ".join(f"{name} {show(value)}" for name, value in best["params"].items())
    done = [trial["val_accuracy"] for trial in _finished(record)]
    near = sum(accuracy >= record["val_accuracy_95"][0] for accuracy in done)
    shares = [f"{name} {100 * share:.0f} %" for name, share in record["importance"].items()]
    text += (f" Trial {best['number']} ({params}) has the best validation accuracy, "
             f"{_accuracy(record, 'val')}.")  # fmt: skip
    if len(done) > 1:
        text += (f" As the best of {len(done)}, this accuracy is optimistic. The interval contains "
                 f"{near} of the {len(done)} finished trials.")  # fmt: skip
    if shares:
        text += (
            f" {next(iter(record['importance']))} matters most. Importance by fANOVA: "
            f"{', '.join(shares)}; interactions explain {100 * record['interactions']:.0f} % of "
            "the variance. A random forest predicts unseen trials with an R² of "
            f"{record['predicted']:.2f}."
        )
    elif record["predicted"] is not None:
        text += (" Importance is not shown because it would be noise: a random forest predicts "
                 f"unseen trials with an R² of only {record['predicted']:.2f}.")  # fmt: skip
    elif len(best["params"]) > 1:
        text += f" Importance needs {MIN_TRIALS} finished trials with different accuracies."
    return (f"{text} On the test images, trial {best['number']} reaches "
            f"{_accuracy(record, 'test')}. The test accuracy of the other trials is not shown, "
            "because it must not influence the choice.")  # fmt: skip


def draw_plots(folder: Path, record: Record, space: Space) -> None:
    """Draws parallel.png, importance.png and a plot for each parameter."""
    if not (done := _finished(record)):
        return
    study = optuna.create_study(direction="maximize")
    for trial in record["trials"]:  # the others are not drawn, but numbers must agree
        is_done = trial["state"] == "complete"
        study.add_trial(optuna.create_trial(
            params=trial["params"], distributions=space,
            state=TrialState.COMPLETE if is_done else TrialState.FAIL,
            value=100 * trial["val_accuracy"] if is_done else None,
        ))  # fmt: skip
    num_pruned = sum(trial["state"] == "pruned" for trial in record["trials"])
    shown = f"{len(done)} finished trials" + f" ({num_pruned} pruned, not shown)" * bool(num_pruned)
    label = "validation accuracy (%)"
    # The context undoes the changes that Optuna makes to matplotlib's style.
    style = ["default", {"figure.constrained_layout.use": True}]
    with warnings.catch_warnings(), plt.style.context(style):
        warnings.simplefilter("ignore")  # functions are experimental, an axis may have one value
        axis = optuna_plots.plot_parallel_coordinate(study, target_name=label)
        axis.collections[0].set(cmap="viridis_r", linewidth=1.5)
        axis.tick_params(axis="x", rotation=0)
        title = f"Parameters and validation accuracy of {shown}"
        _save(axis, folder / "parallel.png", title, len(space))
        for name in space:
            axis = optuna_plots.plot_slice(study, params=[name], target_name=label)
            low, high = (100 * end for end in record["val_accuracy_95"])
            band = axis.axhspan(low, high, color=plots.VAL_COLOR, alpha=0.15, lw=0)
            band.set_label("95 % interval of the best")
            axis.legend(handles=[band], loc="lower right", fontsize=8)
            if isinstance(space[name], CategoricalDistribution):  # Optuna quotes strings
                labels = [label.get_text().strip("'") for label in axis.get_xticklabels()]
                axis.set_xticks(axis.get_xticks(), labels)
            _save(axis, folder / f"{name.lower()}.png", f"Validation accuracy by {name}: {shown}")
        if record["importance"]:
            evaluator = FanovaImportanceEvaluator(seed=record["constants"]["SEED"])
            axis = optuna_plots.plot_param_importances(study, evaluator=evaluator)
            axis.get_legend().remove()
            axis.set(xlabel="share of the variance that single parameters explain", ylabel="")
            _save(axis, folder / "importance.png", f"Importance (fANOVA): {shown}")


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def _finished(record: Record) -> list[Record]:
    return [trial for trial in record["trials"] if trial["state"] == "complete"]


def _accuracies(folder: Path) -> dict[str, Any]:
    """Validation and test accuracy of the best run, with 95 % intervals."""
    try:
        metrics, images = Run(folder).metrics(), Run(folder).config()["dataset"]["val"]
    except OSError as error:
        raise UserError(f"the records of the best trial are missing: {error}") from error
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
            *map(show, trial["params"].values()),
            "" if trial["val_accuracy"] is None else percent(trial["val_accuracy"]),
            trial["epochs"], trial["seconds"],
            "**best**" if trial["number"] == record["best"] else state.replace("|", "/"),
        ])  # fmt: skip
    lines = [*(f"| {' | '.join(map(str, row))} |" for row in rows), "", f"`{record['command']}`"]
    if record["best"] is not None:
        shown = ["parallel", *["importance"] * bool(record["importance"]), *map(str.lower, names)]
        lines += ["", *(f"![]({name}.png)" for name in shown)]
    return "\n".join(lines) + "\n"


def _save(axis: plt.Axes, path: Path, title: str, extra_width: float = 1) -> None:
    for place in ("left", "center"):
        axis.set_title("", loc=place)
    axis.figure.suptitle(title, fontsize=11)
    axis.figure.set_size_inches(5 + 2 * extra_width, 4.6)
    plots.save_figure(axis.figure, path)
