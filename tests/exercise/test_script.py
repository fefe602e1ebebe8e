"""exercise.py as students run it: hints, solution, watching, the report, and the time it takes."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

import exercise
from lab.core import run_script
from tests.exercise.conftest import ROOT, STUDENT, edited, pasted

RELU = pasted(edited("MLP", [("F.gelu(h)", "F.relu(h)")]))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs exercise.py on a model.py: run(source, *flags) -> (status, stdout, stderr, report)."""

    def run(source, *flags):
        (tmp_path / "model.py").write_text(source, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", command(tmp_path, *flags)[1:])
        defaults = {name: value for name, value in vars(exercise).items() if name.isupper()}
        status = 0
        try:
            run_script(exercise.main)
        except SystemExit as end:
            status = end.code
        finally:
            vars(exercise).update(defaults)  # flags replace the script's constants
        report = tmp_path / "results" / "report.json"
        saved = json.loads(report.read_text()) if report.exists() else {}
        return status, *capsys.readouterr(), saved

    return run


def command(folder: Path, *flags: str) -> list[str]:
    paths = ["--model-file", str(folder / "model.py"), "--steps-file", str(folder / "steps.py")]
    words = [sys.executable, str(ROOT / "exercise.py"), *paths]
    return [*words, "--results-dir", str(folder / "results"), *flags]


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


@pytest.mark.parametrize(("flags", "says"), [
    (["--part", "attentoin"], "the parts are PatchEmbed"),
    (["--model-file", "nothing.py"], "there is no file nothing.py"),
    (["--grade", "nothing"], "nothing is not a folder"),
])  # fmt: skip
def test_user_errors_are_sentences(run, flags, says):
    status, _, err, _ = run(RELU, *flags)
    assert status == 2
    assert says in err


def test_what_the_students_code_prints_is_shown(run):
    line = "h = self.fc1(x); print('shape', h.shape)"
    _, out, _, _ = run(pasted(edited("MLP", [("h = self.fc1(x)", line)])), "--part", "mlp")
    assert "Your code printed:\n  shape torch.Size([2, 10, 48])" in out


def test_watch_checks_again_when_the_file_is_saved(tmp_path):
    (tmp_path / "model.py").write_text(RELU, encoding="utf-8")
    words = command(tmp_path, "--watch", "--part", "mlp")
    with subprocess.Popen(
        [words[0], "-u", *words[1:]], stdout=subprocess.PIPE, text=True
    ) as process:
        killer = threading.Timer(100, process.kill)
        killer.start()
        try:
            read_until(process, "fails: values", "report.json")
            (tmp_path / "model.py").write_text(pasted(STUDENT), encoding="utf-8")
            read_until(process, "passed", "report.json")
        finally:
            killer.cancel()
            process.kill()


def read_until(process, *texts):
    for text in texts:
        for line in process.stdout:
            if text in line:
                break
        else:
            pytest.fail(f"{text!r} did not appear")
