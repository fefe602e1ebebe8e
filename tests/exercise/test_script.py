"""exercise.py as students run it: hints, solution, the report."""

import json
from types import SimpleNamespace

import pytest

import exercise
from lab.core import UserError
from lab.exercise.checks import Result
from tests.exercise.conftest import ROOT, STUDENT, edited, pasted
from tests.in_process import run_script

RELU = pasted(edited("MLP", [("F.gelu(h)", "F.relu(h)")]))


@pytest.fixture
def run(tmp_path):
    """Runs exercise.py on a model.py: run(source, *flags) -> (status, stdout, stderr, report)."""

    def run(source, *flags):
        (tmp_path / "model.py").write_text(source, encoding="utf-8")
        ended = run_script(["exercise.py", *flags], tmp_path)
        report = tmp_path / "results" / "exercise" / "report.json"
        saved = json.loads(report.read_text()) if report.exists() else {}
        return *ended, saved

    return run


def test_first_mistake_and_a_hint_are_shown(run):
    status, out, _, report = run(RELU, "--seed", "3")
    assert status == 1
    assert "MLP, values: model.py, line" in out
    assert "The activation function is ReLU." in out
    assert out.count("Hint 1 of 3") == 1
    assert "Hint 2" not in out
    assert report["parts"]["MLP"]["points"] == 0.03
    assert report["parts"]["Attention"]["points"] == 0.24
    assert report["seed"] == 3
    assert out.splitlines()[-1].endswith("report.json")


def test_hint_reveals_one_more_each_time(run):
    outputs = [run(RELU, "--part", "mlp", "--hint")[1] for _ in range(4)]
    assert [out.count("Hint ") for out in outputs] == [1, 2, 3, 3]
    assert run(RELU, "--part", "mlp")[3]["hints"] == {"MLP": 3}


def test_hints_are_there_after_a_part_passes(run):
    _, out, _, _ = run(pasted(STUDENT), "--part", "mlp", "--hint")
    assert "passed" in out
    assert "Hint 1 of 3" in out


def test_solution_needs_a_passing_part_or_giving_up(run):
    status, _, err, _ = run(RELU, "--solution", "mlp")
    assert status == 2
    assert "--give-up" in err
    _, out, _, report = run(RELU, "--solution", "mlp", "--give-up")
    assert "class Mlp(nn.Module)" in out
    assert report["gave_up"] == ["MLP"]
    _, out, _, report = run(pasted(STUDENT), "--solution", "attention")
    assert "class Attention(nn.Module)" in out
    assert report["gave_up"] == ["MLP"]


@pytest.mark.parametrize("part", ["training_step", "evaluate", "replace_head"])
def test_solution_of_a_step_names_a_file_that_exists(run, part):
    _, out, _, _ = run(pasted(STUDENT), "--solution", part)
    assert (ROOT / out.split()[-1]).is_file()


def test_random_inputs_differ_from_run_to_run(run):
    seeds = {run(pasted(STUDENT), "--part", "mlp")[3]["seed"] for _ in range(2)}
    assert len(seeds) == 2


def test_a_teacher_may_remove_parts_and_checks(monkeypatch):
    monkeypatch.setattr(exercise, "POINTS", {"MLP": {"shapes": 0.0}, "Block": {"values": 0.1}})
    assert "0.00 of 0.00" in exercise.line(Result("MLP", passed=["shapes", "options"]))
    assert "0.10 of 0.10" in exercise.line(Result("Block", passed=["shapes", "values"]))
    c = SimpleNamespace(**{name: getattr(exercise, name) for name in exercise.__annotations__})
    assert exercise.job(c).parts == ("MLP", "Block")
    for part, checks, says in (("Blok", {}, "there is no part Blok"),
                               ("MLP", {"vaules": 0.1}, "MLP has no check vaules")):  # fmt: skip
        monkeypatch.setattr(exercise, "POINTS", {part: checks})
        with pytest.raises(UserError, match=f"POINTS: {says}"):
            exercise.job(c)


@pytest.mark.parametrize(("flags", "says"), [
    (["--part", "attentoin"], "did you mean Attention?"),
    (["--seconds", "0"], "leaves no time"),
    (["--model-file", "nothing.py"], "there is no file nothing.py"),
    (["--grade", "nothing"], "nothing is not a folder"),
    (["--grade", ".", "--part", "mlp"], "--grade grades all parts: leave out --part"),
])  # fmt: skip
def test_user_errors_are_sentences(run, flags, says):
    status, _, err, _ = run(RELU, *flags)
    assert status == 2
    assert says in err


def test_what_the_students_code_prints_is_shown(run):
    line = "h = self.fc1(x); print('shape', h.shape)"
    _, out, _, _ = run(pasted(edited("MLP", [("h = self.fc1(x)", line)])), "--part", "mlp")
    assert "Your code printed:\n  shape torch.Size([2, 10, 48])" in out
