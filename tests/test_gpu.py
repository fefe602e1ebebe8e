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

    monkeypatch.setattr(gpu, "matrix_product_rate", lambda device: 0.1)

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
    total = sum(gpu.estimate(part, tflops, tflops < 100) for part in gpu.ALL.values())
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
        words = gpu.command_of(part, values, is_small=True)
        paths = [word for word in words if word.endswith(".py") or word.startswith("tests")]
        if words[1].startswith("benchmarks."):
            paths.append(words[1].replace(".", "/") + ".py")
        assert paths
        assert [path for path in paths if not (gpu.ROOT / path).exists()] == []


def test_small_cards_run_the_subset():
    values = {name: name for name in ("cifar10", "vit_b", "data", "results")}
    for is_small, epochs in ((True, ["3", "1"]), (False, ["3"])):
        words = gpu.command_of(gpu.ALL["vit-b-cifar10"], values, is_small)
        assert [words[i + 1] for i, w in enumerate(words) if w == "--epochs"] == epochs
        assert shlex.join(words).startswith("finetune.py --mode all --dataset cifar10 ")


def test_cards_with_little_memory_run_the_subset(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 24 * 10**9))
    assert gpu.is_small_card(cuda, tflops=150)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (0, 80 * 10**9))
    assert not gpu.is_small_card(cuda, tflops=150)
    assert gpu.is_small_card(cuda, tflops=50)


def test_parts_are_repeated_on_another_card_or_with_other_code(command, capsys, monkeypatch):
    monkeypatch.setitem(gpu.ALL, "speed", gpu.Part("-c pass", ""))
    words = ("--quick", "--parts", "speed")

    def repeated():
        command(*words)
        return "already finished" not in capsys.readouterr().out

    assert repeated()
    assert not repeated()
    monkeypatch.setattr(gpu, "code_of", lambda words: {"train.py": "changed"})
    assert repeated()
    assert not repeated()
    read = gpu.checkpoints.read_json
    monkeypatch.setattr(gpu.checkpoints, "read_json", lambda path: {**read(path), "card": "T4"})
    assert repeated()


def test_attention_alone_is_scored_on_pets(command, monkeypatch):
    started = []
    monkeypatch.setattr(gpu, "find_inputs", lambda names: {name: name for name in names})
    monkeypatch.setattr(gpu.child, "run_child", lambda words, *_, **__: started.append(words) or 0)
    command("--quick", "--parts", "attention")
    assert "--images pets --score" in shlex.join(started[0])
