"""`python -m benchmarks.gpu` at toy size: the chain runs, resumes, and estimates its time."""

import json
import shlex

import pytest
import torch

from benchmarks import gpu
from lab.core import UserError


@pytest.fixture
def command(monkeypatch, tmp_path):
    """A function that runs the command in this process with some flags."""
    names = [name for name in gpu.__annotations__ if name.isupper()]

    def run(*flags):
        for name in names:
            monkeypatch.setattr(gpu, name, getattr(gpu, name))
        words = ["gpu.py", "--results", str(tmp_path), "--benchmarks", str(tmp_path), *flags]
        monkeypatch.setattr("sys.argv", words)
        gpu.main()

    return run


def test_quick_parts_leave_records_and_are_not_repeated(command, capsys, tmp_path):
    parts = ["--quick", "--parts", "pets"]
    command(*parts)
    first = capsys.readouterr().out
    assert "failed" not in first
    (folder,) = (tmp_path / "train").glob("digits-*")
    assert json.loads((folder / "metrics.json").read_text())["test_accuracy"] > 0
    command(*parts)
    assert capsys.readouterr().out.count("already finished") == 1


def test_part_that_fails_is_named_and_the_next_one_still_runs(command, capsys, monkeypatch):
    monkeypatch.setitem(gpu.ALL, "tests", gpu.Part("-c 'raise SystemExit(3)'", ""))
    monkeypatch.setitem(gpu.ALL, "speed", gpu.Part("-c pass", ""))
    with pytest.raises(SystemExit) as end:
        command("--quick", "--parts", "tests,speed")
    assert end.value.code == 1
    out = capsys.readouterr().out
    assert "failed: tests" in out
    assert out.count("done,") == 1


def test_without_a_gpu_the_command_explains_what_to_do(command):
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(UserError, match="need a CUDA GPU; --quick runs"):
        command()


def test_unknown_part_is_named(command):
    with pytest.raises(UserError, match="'cifar' is none of tests, speed"):
        command("--quick", "--parts", "cifar")


@pytest.mark.parametrize(("tflops", "limit"), [(650, 60), (25, 360)])  # an H100, a T4
def test_estimates_keep_the_promised_time(tflops, limit):
    total = sum(gpu.estimate(part, tflops) for part in gpu.ALL.values())
    assert limit / 10 < total <= limit


def test_unavailable_data_and_weights_are_replaced_by_embedded_ones(monkeypatch, capsys):
    def refuse(*_):
        raise UserError("no network")

    monkeypatch.setattr(gpu, "load_data", refuse)
    monkeypatch.setattr(gpu, "load_pretrained", lambda name: None)
    found = gpu.find_inputs({"pets", "race", "vit_b", "results"})
    assert found == {
        "pets": "digits", "race": "mnist-5k --patch-size 7",
        "vit_b": "vit_base_patch16_224.augreg_in21k",
    }  # fmt: skip
    assert "pets is not available, digits is used instead: no network" in capsys.readouterr().out


def test_files_and_fields_of_the_commands_exist():
    """Every part names a script, a module or test files that exist, and only known inputs."""
    values = {name: name for name in (*gpu.INPUTS, "results", "benchmarks", "data", "device")}
    values |= {"finetuned": "run", "scored": "digits"}
    for part in gpu.ALL.values():
        words = gpu.command_of(part, values, tflops=25)
        paths = [word for word in words if word.endswith(".py") or word.startswith("tests")]
        if words[1].startswith("benchmarks."):
            paths.append(words[1].replace(".", "/") + ".py")
        assert paths
        assert [path for path in paths if not (gpu.ROOT / path).exists()] == []


def test_small_cards_run_the_subset():
    values = {name: name for name in ("cifar10", "vit_b", "data", "results")}
    for tflops, epochs in ((25, ["3", "1"]), (650, ["3"])):
        words = gpu.command_of(gpu.ALL["vit-b-cifar10"], values, tflops)
        assert [words[i + 1] for i, w in enumerate(words) if w == "--epochs"] == epochs
        assert shlex.join(words).startswith("finetune.py --mode all --dataset cifar10 ")
