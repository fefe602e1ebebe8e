"""The paragraph, table, importance and plots of a sweep, from made-up trials."""

import random

import numpy as np
import optuna
import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import TrialState, create_trial
from PIL import Image

from lab.core.checkpoints import write_json
from lab.core.stats import wilson_interval
from lab.sweep.summary import draw_plots, write_summary

SPACE = {
    "RATE": FloatDistribution(0, 1),
    "WIDTH": CategoricalDistribution((8, 16, 32)),
    "POOL": CategoricalDistribution(("avg", "token")),
}


def random_points(count):
    rng = random.Random(1)
    choices = {name: kind.choices for name, kind in SPACE.items() if name != "RATE"}
    return [
        {"RATE": rng.random(), **{name: rng.choice(values) for name, values in choices.items()}}
        for _ in range(count)
    ]


def summarize(folder, accuracies, others=(), points=None):
    """The study and summary of finished trials, each validated on 1,000 images, and of others."""
    study = optuna.create_study(direction="maximize")
    points = points or random_points(len(accuracies))
    for number, (point, accuracy) in enumerate(zip(points, accuracies, strict=True)):
        result = {"val_accuracy": accuracy, "epochs": 3, "seconds": 1.5, "folder": f"run{number}",
                  "error": None}  # fmt: skip
        study.add_trial(create_trial(params=point, distributions=SPACE, value=accuracy,
                                     user_attrs={"result": result}))  # fmt: skip
        (folder / f"run{number}").mkdir(parents=True)
        write_json(folder / f"run{number}" / "config.json", {"dataset": {"val": 1000}})
        metrics = {"val_accuracy": accuracy, "test_accuracy": 0.5, "test_accuracy_95": [0.4, 0.6],
                   "test_images": 100}  # fmt: skip
        write_json(folder / f"run{number}" / "metrics.json", metrics)
    for state, result in others:
        study.add_trial(create_trial(state=state, params=points[0], distributions=SPACE,
                                     user_attrs={"result": result}))  # fmt: skip
    config = {"constants": {"SCRIPT": "train.py", "SEED": 0}, "command": "python sweep.py"}
    write_json(folder / "config.json", config)
    return study, write_summary(folder, study, SPACE, len(study.trials) + 2)


@pytest.fixture(scope="module")
def rate_matters(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sweep")
    pruned = {"val_accuracy": 0.3, "epochs": 2, "seconds": 1.0, "folder": "p", "error": None}
    failed = {"val_accuracy": None, "epochs": 0, "seconds": 0, "folder": None, "error": "a|b"}
    points = random_points(40)
    accuracies = [0.5 + 0.4 * p["RATE"] + 0.02 * (p["POOL"] == "avg") for p in points]
    others = [(TrialState.PRUNED, pruned), (TrialState.FAIL, failed)]
    return folder, *summarize(folder, accuracies, others), accuracies, points


def test_importance_is_that_of_optuna(rate_matters):
    _, study, record, _, _ = rate_matters
    evaluator = FanovaImportanceEvaluator(seed=0)
    theirs = get_param_importances(study, evaluator=evaluator)
    assert record["importance"] == pytest.approx(theirs, abs=0.01)
    assert sum(record["importance"].values()) == pytest.approx(1, abs=1e-3)
    assert record["importance"]["RATE"] > 0.9
    assert 0 <= record["interactions"] < 0.2
    assert record["predicted"] > 0.8


def test_paragraph_states_the_facts(rate_matters):
    _, _, record, accuracies, points = rate_matters
    text, best = record["says"], int(np.argmax(accuracies))
    low, high = wilson_interval(round(1000 * max(accuracies)), 1000)
    near = sum(accuracy >= low for accuracy in accuracies)
    assert record["best"] == best
    for fact in (
        "44 trials of train.py: 40 finished, 1 pruned, 1 failed.",
        f"Trial {best} (RATE {points[best]['RATE']}, WIDTH {points[best]['WIDTH']}, POOL ",
        f"{100 * max(accuracies):.2f} % of 1,000 images (95 % interval {100 * low:.1f} to "
        f"{100 * high:.1f})",
        f"contains {near} of the 40 finished trials",
        f"RATE {100 * record['importance']['RATE']:.0f} %",
        "RATE matters most",
        f"R² of {record['predicted']:.2f}",
        f"trial {best} reaches 50.00 % of 100 images (95 % interval 40.0 to 60.0)",
    ):
        assert fact in text


def test_table_lists_trials_by_accuracy(rate_matters):
    folder, _, record, _, points = rate_matters
    lines = (folder / "sweep.md").read_text().splitlines()
    rows = [line.split(" | ") for line in lines if line.startswith("| [")]
    reached = [float(row[4].removesuffix(" %")) for row in rows]
    assert reached == sorted(reached, reverse=True)
    assert len(rows) == 41
    best = record["best"]
    assert rows[0][0] == f"| [{best}](run{best}/)"
    assert rows[0][1:4] == [str(points[best][name]) for name in SPACE]
    assert rows[0][-1] == "**best** |"
    assert rows[-1][-1] == "pruned |"
    assert any(line.startswith("| 41 |") and line.endswith("failed: a/b |") for line in lines)
    assert "`python sweep.py`" in lines
    assert lines[-5:] == [f"![]({name}.png)" for name in
                          ("parallel", "importance", "rate", "width", "pool")]  # fmt: skip


def test_noise_is_not_reported_as_importance(tmp_path):
    rng = random.Random(0)
    study, record = summarize(tmp_path, [0.9 + rng.uniform(0, 0.001) for _ in range(40)])
    raw = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    assert max(raw.values()) > 0.2  # fANOVA finds importance in anything
    assert record["importance"] == {}
    assert "it would be noise" in record["says"]
    assert "contains 40 of the 40 finished trials" in record["says"]
    assert "matters most" not in record["says"]
    assert "importance" not in (tmp_path / "sweep.md").read_text()


@pytest.mark.parametrize("accuracies", [[0.1 * i for i in range(9)], [0.5] * 12])
def test_few_or_equal_trials_have_no_importance(accuracies, tmp_path):
    _, record = summarize(tmp_path, accuracies)
    assert record["importance"] == {}
    assert "Importance needs 10 finished trials with different accuracies" in record["says"]


def test_sweep_without_finished_trials_has_a_summary(tmp_path):
    _, record = summarize(tmp_path, [])
    assert record["says"] == "2 trials of train.py: 0 finished, 0 pruned, 0 failed."
    assert record["best"] is None
    draw_plots(tmp_path, record, SPACE)
    assert not [*tmp_path.glob("*.png")]


def test_plots_show_every_parameter_and_leave_the_style_alone(rate_matters, recwarn):
    import matplotlib.pyplot as plt

    folder, _, record, _, _ = rate_matters
    before = dict(plt.rcParams)
    draw_plots(folder, record, SPACE)
    assert dict(plt.rcParams) == before
    assert not plt.get_fignums()
    names = {path.stem for path in folder.glob("*.png")}
    assert names == {"parallel", "importance", "rate", "width", "pool"}
    for name in names:
        assert np.asarray(Image.open(folder / f"{name}.png")).std() > 10
    assert not [w for w in recwarn if "summary.py" in str(w.filename)]
