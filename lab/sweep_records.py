"""What came out of a sweep: its folder, its records, what they say, and the table."""

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from filelock import FileLock
from optuna.importance import FanovaImportanceEvaluator
from optuna.trial import FrozenTrial, TrialState
from sklearn.ensemble import RandomForestRegressor

from lab.core.checkpoints import write_atomically, write_json
from lab.core.errors import UserError
from lab.core.runs import Run, describe_differences, provenance
from lab.core.stats import wilson_interval
from lab.sweep_space import Parameter, show

STATES = {TrialState.COMPLETE: "complete", TrialState.PRUNED: "pruned", TrialState.FAIL: "failed"}
ENOUGH = 10  # finished trials for shares of the variance
NOISE = 0.1  # share of the variance that a forest must explain on trials that it has not seen
TOP = 10  # trials that are compared with the interval of the best

FACTS = ("script", "space", "fixed", "sampler", "seed", "command", "identity", "made")

Record = dict[str, Any]  # the content of sweep.json


def open_sweep(place: Path, name: str, facts: Record, fresh: bool) -> Path:
    """Finds the folder of this very sweep, or makes a new one; as `Run.open` does for runs.

    Args:
        place: `results/sweep`.
        name: what the sweep is called unless that is taken by another one.
        facts: for sweep.json; "identity" tells a sweep from others.
        fresh: start over, deleting what is there.
    """
    place.mkdir(parents=True, exist_ok=True)
    with FileLock(place / ".lock"):  # two may start together
        for number in count(1):
            folder = place / (name if number == 1 else f"{name}-{number}")
            there = read_record(folder).get("identity")
            if there == facts["identity"] and fresh:
                print(f"{folder}: starting over, its runs are deleted")
                shutil.rmtree(folder)
            elif there == facts["identity"]:
                return folder
            if not folder.exists() or not any(folder.iterdir()):
                folder.mkdir(exist_ok=True)
                begun = {"trials": [], "says": "No trial has ended yet."}
                write_json(folder / "sweep.json", {**facts, "made": provenance(), **begun})
                return folder
            if there:
                print(
                    f"{folder} is another sweep ({describe_differences(there, facts['identity'])})"
                )


def read_record(folder: Path) -> Record:
    """The content of sweep.json; {} where there is none that can be read."""
    try:
        return json.loads((folder / "sweep.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def write_records(folder: Path, study: optuna.Study, space: list[Parameter], asked: int) -> Record:
    """Writes sweep.json and sweep.md.

    Args:
        folder: the sweep's, with the folders of its runs.
        study: its trials; those that ended count.
        space: its parameters.
        asked: how many trials there shall be.

    Returns: the content of sweep.json.
    """
    facts = read_record(folder)
    ended = [t for t in study.get_trials(deepcopy=False) if t.state in STATES]
    trials = [
        {"number": t.number, "state": STATES[t.state], "params": t.params, **t.user_attrs["result"]}
        for t in ended
    ]
    done = [t for t in ended if t.state == TrialState.COMPLETE]
    best = max(done, key=lambda t: (t.value, -t.number), default=None)
    record = {
        **{k: facts[k] for k in FACTS},
        "asked": asked,
        "trials": trials,
        **importance(study, space, done, facts["seed"]),
        "best": best.number if best else None,
        **(accuracies(folder / best.user_attrs["result"]["folder"]) if best else {}),
    }
    record["says"] = says(record)
    write_json(folder / "sweep.json", record)
    text = table(folder.name, record)
    write_atomically(
        folder / "sweep.md", lambda scratch: scratch.write_text(text, encoding="utf-8")
    )
    return record


def importance(
    study: optuna.Study, space: list[Parameter], done: list[FrozenTrial], seed: int
) -> dict[str, Any]:
    """Each parameter's share of the variance of validation accuracy, by fANOVA.

    The shares are of the parameters alone, as predicted by a forest that learned all finished
    trials (Hutter et al. 2014); the rest is their interactions. A forest finds shares in noise too,
    so `predicted` is how much of the variance a forest explains on trials that it has not seen
    (out-of-bag R2): near 0, the shares mean nothing.
    """
    values = np.array([t.value for t in done])
    if len(done) < ENOUGH or len(space) < 2 or np.ptp(values) == 0:
        return {"importance": {}, "predicted": None}
    shares = FanovaImportanceEvaluator(seed=seed).evaluate(study)
    points = [
        [p.choices.index(t.params[p.name]) if p.choices else t.params[p.name] for p in space]
        for t in done
    ]
    forest = RandomForestRegressor(200, oob_score=True, random_state=seed).fit(points, values)
    return {
        "importance": {name: round(share, 4) for name, share in shares.items()},
        "predicted": round(float(forest.oob_score_), 4),
    }


def accuracies(folder: Path) -> dict[str, Any]:
    """Of the chosen run, and of no other: accuracy on validation and test images, intervals."""
    try:
        metrics, images = Run(folder).metrics(), Run(folder).config()["dataset"]["val"]
    except OSError as error:
        raise UserError(f"{folder}, the best run, lost its records: {error}") from error
    low, high = wilson_interval(round(metrics["val_accuracy"] * images), images)
    return {
        "val_images": images,
        "val_accuracy": metrics["val_accuracy"],
        "val_accuracy_95": [round(low, 4), round(high, 4)],
        **{k: metrics[k] for k in ("test_images", "test_accuracy", "test_accuracy_95")},
    }


def says(record: Record) -> str:
    """A paragraph about the sweep, from its records alone."""
    done = [t for t in record["trials"] if t["state"] == "complete"]
    sentences = [counted(record)]
    if done:
        sentences += [chosen(record, len(done)), mattered(record, len(done)), apart(record, done)]
        sentences.append(
            f"On the test images trial {record['best']} reaches {percent(record['test_accuracy'])} "
            f"({interval(record['test_accuracy_95'])}, {record['test_images']:,} images). It alone "
            "is shown on them: the best of many test accuracies would owe part of it to luck."
        )
    return " ".join(filter(None, sentences))


def counted(record: Record) -> str:
    """How many trials ended, and how."""
    states = [trial["state"] for trial in record["trials"]]
    words = {"complete": "finished", "pruned": "pruned as hopeless", "failed": "failed"}
    told = [f"{states.count(key)} {word}" for key, word in words.items() if key in states]
    if len(states) < record["asked"]:
        told.append(f"{record['asked'] - len(states)} still to do")
    return f"Trials of {record['script']}: {', '.join(told)}."


def chosen(record: Record, finished: int) -> str:
    """Which trial validation chose."""
    best = next(t for t in record["trials"] if t["number"] == record["best"])
    params = ", ".join(f"{name} {show(value)}" for name, value in best["params"].items())
    return (
        f"Validation chose trial {best['number']} ({params}): {percent(best['val_accuracy'])} of "
        f"{record['val_images']:,} validation images, 95 % interval "
        f"{interval(record['val_accuracy_95'])}"
        + (f"; as the highest of {finished} it is flattered." if finished > 1 else ".")
    )


def mattered(record: Record, finished: int) -> str:
    """How much each parameter mattered, or why that is not said."""
    shares, predicted = record["importance"], record["predicted"]
    if not shares:
        if finished < ENOUGH:
            return (f"Which parameter mattered is not said: fANOVA needs at least {ENOUGH} "
                    f"finished trials, not {finished}.")  # fmt: skip
        if len(record["trials"][0]["params"]) > 1:
            return "Nothing mattered: all finished trials reached the same accuracy."
        return ""  # a single parameter has all of the variance
    told = ", ".join(f"{name} {100 * share:.0f} %" for name, share in shares.items())
    between = max(0.0, 1 - sum(shares.values()))
    text = (
        f"Of the variance of validation accuracy over the {finished} finished trials (pruned and "
        f"failed ones are not counted) fANOVA gives {told}, and "
        f"{100 * between:.0f} % to their interplay"
    )
    if predicted < NOISE:
        return text + (", but a forest predicts trials that it has not seen no better than their "
                       "mean does: these shares are noise.")  # fmt: skip
    return text + (f"; a forest explains {100 * predicted:.0f} % of it on trials that it has not "
                   f"seen. {next(iter(shares))} mattered most.")  # fmt: skip


def apart(record: Record, done: list[Record]) -> str:
    """Whether the validation images can tell the best trials from each other."""
    best = sorted((t["val_accuracy"] for t in done), reverse=True)[:TOP]
    low, points = record["val_accuracy_95"][0], 100 * (best[0] - best[-1])
    if len(best) < 2:
        return ""
    if best[-1] >= low:
        near = f"lie within {points:.1f} points, inside the interval of one" if points else "tie"
        return (
            f"The best {len(best)} {near}: {record['val_images']:,} images cannot tell them apart."
        )
    inside = sum(value >= low for value in best)
    return f"Inside the interval of the best: {inside} of the best {len(best)}."


def table(title: str, record: Record) -> str:
    """sweep.md: the paragraph, the trials by validation accuracy, the pictures."""
    trials = sorted(record["trials"], key=lambda t: (-(t["val_accuracy"] or -1), t["number"]))
    names = list(trials[0]["params"]) if trials else []
    head = ["trial", *names, "validation accuracy", "epochs", "seconds", ""]
    lines = [f"# {title}", "", record["says"], ""]
    if trials:
        lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for t in trials:
        link = f"[{t['number']}]({t['folder']}/)" if t["folder"] else t["number"]
        reached = "" if t["val_accuracy"] is None else percent(t["val_accuracy"])
        ending = {"complete": "", "pruned": "pruned", "failed": f"failed: {t['error']}"}[t["state"]]
        ending = "**chosen**" if t["number"] == record["best"] else ending.replace("|", "/")
        cells = [link, *map(show, t["params"].values()), reached, t["epochs"], t["seconds"], ending]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    lines += ["", f"`{record['command']}`"]
    if record["best"] is not None:
        lines += ["", *(f"![]({name})" for name in ["parallel.png", *map(picture, names)])]
    return "\n".join(lines) + "\n"


def picture(name: str) -> str:
    """The file that shows a parameter."""
    return f"{name.lower()}.png"


def percent(share: float) -> str:
    return f"{100 * share:.2f} %"


def interval(shares: list[float]) -> str:
    low, high = (100 * share for share in shares)
    return f"{low:.1f} to {high:.1f}"
