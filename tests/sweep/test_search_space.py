"""Which constants of which script can be swept, and the points that are tried."""

import itertools
import math
import random
import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import TrialState, create_trial

from lab.core import UserError, constants
from lab.sweep.search_space import Script, next_point, num_points, parse_space

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def train():
    return Script.load(str(ROOT / "train.py"), "--epochs 3")


def draw(space, count, sampler="random", seed=0, accuracy=lambda point: 0.5):
    """The first points of a sweep, and their trials."""
    trials = []
    while len(trials) < count and (point := next_point(space, sampler, seed, trials)):
        trials.append(create_trial(params=point, distributions=space, value=accuracy(point)))
    return [trial.params for trial in trials], trials


def test_space_has_choices_ranges_and_logarithmic_ranges(train):
    text = ("LEARNING_RATE=log:3e-4..1e-2 DEPTH=2..8 WEIGHT_DECAY=0..0.5 EMBED_DIM=none,32,064 "
            "GLOBAL_POOL=avg,token FLIP=true,false MODEL_ARGS='a b,1..2'")  # fmt: skip
    assert parse_space(text, train, "random") == {
        "LEARNING_RATE": FloatDistribution(3e-4, 1e-2, log=True),
        "DEPTH": IntDistribution(2, 8),
        "WEIGHT_DECAY": FloatDistribution(0, 0.5),
        "EMBED_DIM": CategoricalDistribution((None, 32, 64)),
        "GLOBAL_POOL": CategoricalDistribution(("avg", "token")),
        "FLIP": CategoricalDistribution((True, False)),
        "MODEL_ARGS": CategoricalDistribution(("a b", "1..2")),
    }


@pytest.mark.parametrize(
    ("space", "message"),
    [
        ("LERNING_RATE=1,2", "train.py has no constant LERNING_RATE; did you mean LEARNING_RATE"),
        ("learning_rate=1,2", "no constant learning_rate; did you mean LEARNING_RATE"),
        ("DEPTH", "'DEPTH' must be NAME=a,b,c or NAME=low..high"),
        ("DEPTH=1,two", "DEPTH=two: argument --depth: 'two' is not an integer or None"),
        ("DEPTH=1..2.5", "DEPTH=2.5: argument --depth: 2.5 is not an integer"),
        ("LEARNING_RATE=log:1,2", "'log:1' is not a number or None"),
        ("LEARNING_RATE=nan,1", "nan is not a finite number"),
        ("GLOBAL_POOL=avg,max", "GLOBAL_POOL=max: argument --global-pool: 'max' is not one of"),
        ("GLOBAL_POOL=1..2", "'1' is not one of token, avg"),
        ("COMPILE=yes,no", "COMPILE=yes: choose true or false"),
        ("DEPTH=3..1", "DEPTH=3..1: the low end must be below the high end"),
        ("DEPTH=none..3", "the low end must be below the high end"),
        ("LEARNING_RATE=log:0..1", "a logarithmic range must start above 0"),
        ("DEPTH=3", "DEPTH=3 is a single value: put it in FIXED"),
        ("DEPTH=3,03", "DEPTH=3,03 contains a duplicate value"),
        ("DEPTH=1,2 DEPTH=1,2", "DEPTH is in SPACE twice"),
        ("EPOCHS=1,2", "EPOCHS is in SPACE and in FIXED"),
        ("NAME=a,b", "SPACE cannot contain NAME: the sweep sets it"),
        ("OVERWRITE=true,false", "SPACE cannot contain OVERWRITE: the sweep sets it"),
        ("DATA_DIR=a,b", "DATA_DIR: it does not change the result"),
        ("DATASET=digits,pets", "DATASET: accuracies on other validation images"),
        ("", "SPACE is empty"),
        ("DEPTH='1,2", "cannot be read: No closing quotation"),
    ],
)
def test_wrong_space_is_a_user_error(train, space, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_space(space, train, "random")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--script", "trian.py"], "SCRIPT='trian.py' does not exist; did you mean train.py"),
        (["--script", "README.md"], "'README.md' does not exist; choose from attention_viz.py"),
        (["--script", "model.py"], "'model.py' has no main() that reads constants"),
        (["--script", "report.py"], "'report.py' does not train"),
        (["--script", "sweep.py"], "'sweep.py' does not train"),
        (["--fixed", "--epoch 3"], "FIXED: unknown flag --epoch; did you mean --epochs?"),
        (["--fixed", "--epochs many"], "FIXED: argument --epochs: 'many' is not an integer"),
        (["--fixed", "--name x"], "FIXED cannot contain NAME: the sweep sets it"),
        (["--fixed", "--num-seeds 3"], "FIXED cannot contain NUM_SEEDS: the sweep sets it"),
        (["--sampler", "grid"], "SAMPLER=grid tries every point, but SPACE has inf (at most"),
        (["--script", "finetune.py", "--fixed", "--mode all"], "MODE=all starts many runs"),
        (["--script", "finetune.py", "--space", "MODE=head,all"], "MODE=all starts many runs"),
        (["--script", "finetune_swin.py", "--space", "PRETRAINED=a,b"], "no constant PRETRAINED"),
        (["--script", "cnn_baseline.py", "--space", "MODEL_ARGS=a,b"], "no constant MODEL_ARGS"),
        (["--trials", "0"], "TRIALS=0 must be between 1 and 10,000"),
        (["--trials", "1000000000"], "TRIALS=1000000000 must be between 1 and 10,000"),
        (["--processes", "0"], "PROCESSES=0 must be between 1"),
        (["--prune-after-epochs", "-1"], "PRUNE_AFTER_EPOCHS=-1 must be between 1"),
    ],
)
def test_mistake_ends_with_a_sentence_before_any_run(words, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", ["sweep.py", "--results-dir", str(tmp_path / "no"), *words])
    with pytest.raises(SystemExit) as end:
        runpy.run_path("sweep.py", run_name="__main__")
    assert end.value.code == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "no").exists()


def test_broken_script_is_a_user_error(tmp_path, capsys):
    script = tmp_path / "mine.py"
    script.write_text("import nothing_of_that_name\n")
    with pytest.raises(UserError, match="cannot be imported: No module named 'nothing_of_that"):
        Script.load(str(script), "")
    script.write_text("import sys\nfrom lab.core import constants\nEPOCHS: int = 1.5\n"
                      "def main():\n    constants.override(sys.modules[__name__])\n")  # fmt: skip
    with pytest.raises(SystemExit):
        Script.load(str(script), "")
    assert "mine.py, line 3: EPOCHS = 1.5: 1.5 is not an integer" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["cnn_baseline.py", "finetune_swin.py"])
def test_inherited_constants_can_be_swept(name):
    script = Script.load(str(ROOT / name), "")
    assert parse_space("LEARNING_RATE=1e-3,1e-2", script, "grid")


def test_flags_are_read_back_as_the_same_values():
    values = {"LEARNING_RATE": 1.234e-7, "DEPTH": None, "COMPILE": True, "FLIP": False,
              "MODEL_ARGS": "a=1 b=(2,)", "TRANSLATE": -0.5}  # fmt: skip
    words = shlex.join(constants.as_flags(values))
    script = Script.load(str(ROOT / "train.py"), words)
    assert {name: script.values[name] for name in values} == values
    *others, last = script.flags({"DEPTH": 3})
    assert last == "--depth=3"
    assert {"--num-seeds=1", "--snapshots=0", "--no-overwrite"} <= set(others)


@pytest.mark.parametrize("sampler", ["grid", "random", "tpe"])
def test_small_space_is_tried_once_and_completely(sampler):
    choices = {"WIDTH": (1, 2, None), "RATE": (1, 5), "POOL": ("avg", "token")}
    space = {name: CategoricalDistribution(values) for name, values in choices.items()}
    product = [*itertools.product(*choices.values())]
    points, _ = draw(space, 99, sampler)
    tried = [tuple(point[name] for name in space) for point in points]
    assert sorted(tried, key=str) == sorted(product, key=str)
    assert tried != product
    assert num_points(space) == len(product)
    assert points == draw(space, 99, sampler)[0]
    assert points != draw(space, 99, sampler, seed=1)[0]


def test_points_do_not_depend_on_results_and_have_four_digits():
    space = {"RATE": FloatDistribution(1e-5, 1, log=True), "DEPTH": IntDistribution(1, 9)}
    points, _ = draw(space, 30)
    assert points == draw(space, 30, accuracy=lambda point: random.random())[0]
    assert num_points(space) == math.inf
    for point in points:
        assert float(f"{point['RATE']:.4g}") == point["RATE"]
        assert space["RATE"]._contains(point["RATE"])
        assert 1 <= point["DEPTH"] <= 9
    logs = [math.log10(point["RATE"]) for point in points]
    assert -4 < sum(logs) / len(logs) < -1  # the middle is -2.5
    other = draw(space, 30, seed=1)[0]
    assert not any(point in points for point in other)


def test_tpe_returns_to_good_regions():
    space = {"RATE": FloatDistribution(1e-5, 1.0, log=True)}

    def accuracy(point):
        return -abs(math.log10(point["RATE"]) + 2)

    _, trials = draw(space, 40, "tpe", accuracy=accuracy)
    assert all(trial.state == TrialState.COMPLETE for trial in trials)
    values = [trial.value for trial in trials]
    assert sorted(values[20:])[10] > sorted(values[:10])[5]  # medians; the first ten are random


def test_scripts_of_the_lab_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert Script.load("train.py", "").path == ROOT / "train.py"
