"""train.py as a user runs it: it finishes, is interrupted, killed and resumed, and is misused."""

import csv
import json
import random
import re
import shlex
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train
from lab.core import UserError
from tests.drills.harness import run_fresh
from tests.figures import real_figures
from tests.in_process import run_script
from tests.training import interrupted

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--dataset", "digits", "--embed-dim", "32", "--depth", "2", "--epochs", "4",
         "--batch-size", "64"]  # fmt: skip
RANDOM = ["--drop-rate", "0.1", "--mixup", "0.5", "--cutmix", "1", "--mix-probability", "0.7",
          "--auto-augment", "trivial", "--random-erasing", "0.3", "--ema-decay", "0.9",
          "--epochs", "6", "--progressive-resize", "0.5"]  # fmt: skip
NO_SIZES = ["--embed-dim", "none", "--depth", "none"]  # of SMALL
STEPS = 1295 // 64  # of an epoch


def command(place, *words):
    return ["train.py", "--results-dir", str(place), *SMALL, *words]


def run(place, *words):
    """Runs train.py in this process: exit status, stdout, stderr."""
    return run_script(command(place, *words))


def interrupt(place, number, at, *words):
    """Starts a run and sends it a signal before step `at`, an (epoch, step): status and output."""
    log = place.with_name(f"{place.name}.log")
    return interrupted.interrupt(command(place, *words), number, at, log)


def history(folder):
    """history.csv without what depends on the clock and the machine."""
    with open(folder / "history.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    measured = ("seconds", "images_per_second", "peak_memory_mb")
    return [{k: v for k, v in row.items() if k not in measured} for row in rows]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    place = tmp_path_factory.mktemp("whole")
    with real_figures():
        status, out, err = run(place, *RANDOM)
    assert status == 0, err
    (folder,) = place.iterdir()
    assert Image.open(folder / "curves.png").width > 500
    return folder, out


def test_resume_equals_uninterrupted(uninterrupted, tmp_path):
    """Killed, terminated and interrupted at random steps: the same weights, bit by bit."""
    seed = random.randrange(10**6)
    rng = random.Random(seed)
    signals = (signal.SIGTERM, signal.SIGKILL, signal.SIGINT)
    for number, epoch in zip(signals, (1, 3, 5), strict=True):
        step = rng.randrange(1, STEPS - 1)  # after the last step, the epoch would be complete
        stopped = interrupt(tmp_path / "runs", number, (epoch, step), *RANDOM)
        status, err = stopped.status, stopped.output
        assert "Traceback" not in err, (seed, err)
        if number == signal.SIGKILL:
            assert status == -number
        else:
            assert status == 128 + number, (seed, err)
            assert f"stopped and saved at epoch {epoch}, step {step + 1}" in err, (seed, err)
            assert re.search(r"with: python .*train\.py --results-dir", err)
    status, _, err = run(tmp_path / "runs", *RANDOM)
    assert status == 0, err
    whole, (folder,) = uninterrupted[0], (tmp_path / "runs").iterdir()
    ours, theirs = (load_file(f / "best.safetensors") for f in (folder, whole))
    assert ours.keys() == theirs.keys()
    assert all(ours[k].equal(theirs[k]) for k in ours), seed
    ours, theirs = (torch.load(f / "last.pt", weights_only=True) for f in (folder, whole))
    for part in ("model", "ema"):
        assert all(v.equal(theirs[part][k]) for k, v in ours[part].items()), seed
    for index, moments in ours["optimizer"]["state"].items():
        for name, value in moments.items():
            assert value.equal(theirs["optimizer"]["state"][index][name]), seed
    assert history(folder) == history(whole)
    assert (folder / "predictions.csv").read_text() == (whole / "predictions.csv").read_text()


def test_a_run_leaves_its_records(uninterrupted):
    folder, out = uninterrupted
    names = {p.name for p in folder.iterdir()} - {".lock"}
    assert names == {
        "config.json", "history.csv", "metrics.json", "predictions.csv", "curves.png",
        "confusion.png", "best.safetensors", "last.pt", "snapshots",
    }  # fmt: skip
    assert out.rstrip().endswith("curves.png")
    config = json.loads((folder / "config.json").read_text())
    assert config["constants"]["DEPTH"] == 2
    assert config["model"]["parameters"] > 0
    assert config["dataset"]["train"] == 1295
    assert config["versions"]["torch"] == torch.__version__.split("+")[0]
    assert "--embed-dim 32" in config["command"]
    metrics = json.loads((folder / "metrics.json").read_text())
    with open(folder / "predictions.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    right = sum(row["label"] == row["prediction"] for row in rows)
    assert metrics["test_accuracy"] == pytest.approx(right / len(rows), abs=1e-6)
    low, high = metrics["test_accuracy_95"]
    assert low < metrics["test_accuracy"] < high
    costs = [config["model"]["small_images"]["training_flops"], config["model"]["training_flops"]]
    assert costs[0] < costs[1]
    assert metrics["training_flops"] == 3 * 1280 * sum(costs), "three epochs of either size"
    accuracies = [float(row["val_accuracy"]) for row in history(folder)]
    assert max(accuracies) == metrics["val_accuracy"] == accuracies[metrics["best_epoch"] - 1]


def test_a_finished_run_is_not_repeated_and_never_overwritten(uninterrupted):
    folder, _ = uninterrupted
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    status, out, _ = run(folder.parent, *RANDOM)
    assert status == 0
    assert "this run is finished; --overwrite repeats it" in out
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before

    status, out, err = run(folder.parent, *RANDOM, "--learning-rate", "3e-3", "--epochs", "1")
    assert status == 0, err
    assert "LEARNING_RATE: 0.002 there, 0.003 in this run" in out
    assert "differs only in EPOCHS" not in out
    assert {p.name for p in folder.parent.iterdir()} == {
        folder.name,
        "digits-vit_32x2-e1-lr0.003-s0",
    }
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before


def test_more_epochs_are_a_new_run_that_says_so(tmp_path):
    assert run(tmp_path, "--epochs", "1")[0] == 0
    status, out, err = run(tmp_path, "--epochs", "2")
    assert status == 0, err
    first, second = tmp_path / "digits-vit_32x2-s0", tmp_path / "digits-vit_32x2-e2-s0"
    assert f"{first} is a finished run that differs only in EPOCHS=1. This run starts from" in out
    words = ["--pretrained", str(first), "--dataset=digits", "--train-fraction=1.0"]
    advice = f"python finetune.py {shlex.join(words)}\n"
    assert advice in out
    assert len(history(second)) == 2
    assert "is the same run with" not in run(tmp_path, "--epochs", "2")[1]


@pytest.mark.parametrize(
    ("words", "advice"),
    [
        (["--dataset", "cats"], "DATASET='cats' is neither a folder nor one of mnist-5k, digits"),
        (["--patch-size", "0"], "patch_size=0 must be at least 1"),
        (["--patch-size", "3"], r"patch_size=3 must divide img_size=8"),
        (["--num-heads", "5"], r"num_heads=5 must divide embed_dim=32"),
        (["--learning-rate", "20"], r"LEARNING_RATE=20.0 must lie in \(0, 1\)"),
        (["--epochs", "0"], "EPOCHS=0 must be at least 1"),
        (["--batch-size", "0"], "BATCH_SIZE=0 must be at least 1"),
        (["--batch-size", "many"], "argument --batch-size: 'many' is not an integer or None"),
        (["--warmup-fraction", "1"], r"WARMUP_FRACTION=1.0 must lie in \[0, 1\)"),
        (["--val-fraction", "2"], "VAL_FRACTION=2.0 must be between 0 and 1"),
        (["--label-smoothing", "-1"], "LABEL_SMOOTHING=-1.0"),
        (["--progressive-resize", "1"], r"PROGRESSIVE_RESIZE=1.0 must lie in \[0, 1\)"),
        (["--progressive-resize", "0.5", "--patch-size", "8"],
         "PROGRESSIVE_RESIZE needs at least two patches per side: lower PATCH_SIZE"),
        (["--progressive-resize", "0.5", "--model", "vit_tiny_patch16_224", *NO_SIZES,
          "--model-args", "img_size=8 patch_size=4"],
         'accepts them with MODEL_ARGS="dynamic_img_size=True"'),
        (["--learning-rate", "0.9", "--clip-grad", "0", "--warmup-fraction", "0",
          "--weight-decay", "1e9"],
         r"the loss became (nan|inf) in epoch \d+, step \d+, at learning rate"),
        (["--weight-decay", "-1"], "WEIGHT_DECAY=-1.0 must be 0 or larger"),
        (["--seed", "-3"], "-3 is negative"),
        (["--mixup", "0.8"], "MIXUP=0.8 has no effect while MIX_PROBABILITY is 0"),
        (["--model", "vgg11", *NO_SIZES, "--patch-size", "4"], "PATCH_SIZE would have no effect"),
        (["--model", "vit_tiny_patch16_224", *NO_SIZES, "--img-size", "24"],
         "has patches of 16 pixels, which do not fit into 24 pixels"),
        (["--model-args", "depth=3"], "MODEL_ARGS='depth=3' has no effect on MODEL=vit"),
        (["--model", "vgg11"], "EMBED_DIM, DEPTH would have no effect on MODEL=vgg11"),
        (["--model", "vgg11", *NO_SIZES], "vgg11 cannot process images of 8 x 8 pixels"),
        (["--embed-dim", "10000000", "--num-heads", "1"], "not enough memory. Lower the size"),
        (["--lerning-rate", "1"], "did you mean --learning-rate"),
    ],
)  # fmt: skip
def test_a_mistake_ends_with_a_sentence(tmp_path, words, advice):
    status, _, err = run(tmp_path, *words)
    assert status == 2, err
    assert re.search(advice, err), err


@pytest.mark.parametrize(("old", "new", "says"), [
    ("out = self.proj(out)", "out = self.proj(out / 0)", "NaN or infinite logits or gradients"),
    ("out = self.proj(out)", "out = self.projj(out)", r"mine.py, line \d+: AttributeError"),
    ("self.proj = nn.Linear(", "self.proj = nn.Linearr(", r"mine.py, line \d+: AttributeError"),
    ("self.blocks = nn.Sequential(*", "self.more = [nn.Linear(2, 2)]\n        "
     "self.blocks = nn.Sequential(*", "more is a Python list"),
])  # fmt: skip
def test_a_mistake_in_model_py_is_found_before_training(tmp_path, old, new, says):
    code = (ROOT / "model.py").read_text(encoding="utf-8")
    assert code.count(old) == 1
    (tmp_path / "mine.py").write_text(code.replace(old, new), encoding="utf-8")
    words = command(tmp_path / "runs", "--model-file", str(tmp_path / "mine.py"))
    done = run_fresh(words, ROOT, tmp_path)
    assert done.status == 2, done.output
    assert re.search(says, done.output), done.output
    assert not (tmp_path / "runs").exists()


def test_a_damaged_state_is_named(tmp_path):
    place = tmp_path / "runs"
    stopped = interrupt(place, signal.SIGINT, (2, 4), "--epochs", "99")
    assert stopped.status == 130, stopped.output
    (folder,) = place.iterdir()
    (folder / "last.pt").write_bytes(b"not a state")
    status, _, err = run(place, "--epochs", "99")
    assert status == 2
    assert "last.pt cannot be read" in err
    assert "--overwrite" in err


def test_importing_train_loads_only_what_it_needs():
    """Slow or unrelated packages are loaded when they are used."""
    code = "import sys, train; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "lab.training.loop" in loaded
    packages = ("finetuning", "attention", "sweep", "report", "exercise")
    unwanted = {f"lab.{package}" for package in packages} | {
        "lab.models.conversion", "sklearn", "matplotlib", "optuna", "scipy", "timm", "torchvision"
    }  # fmt: skip
    assert not loaded & unwanted


@pytest.mark.parametrize(("dataset", "optimizer"), [("digits", "adamw"), ("mnist-5k", "muon")])
def test_first_step_loads_no_library_that_it_does_not_need(dataset, optimizer, tmp_path):
    """scikit-learn, scipy, timm and torchvision together take longer to import than torch.

    What torch and accelerate load by themselves, as accelerate 1.10 loads huggingface_hub, is
    not ours to avoid.
    """
    code = (
        "import sys, runpy, accelerate\n"
        "print(*sys.modules)\n"
        "from lab.training.progress import Progress\n"
        "Progress.finish_step = lambda self: (print(*sys.modules), sys.exit())\n"
        "runpy.run_path('train.py', run_name='__main__')"
    )
    words = ["--dataset", dataset, "--optimizer", optimizer, "--results-dir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    loaded = set(lines[-1].split()) - set(lines[0].split())
    assert "lab.training.loop" in loaded
    slow = {"sklearn", "scipy", "pandas", "timm", "torchvision", "matplotlib", "huggingface_hub",
            "torch._dynamo", "torch.distributed.tensor", "sympy"}  # fmt: skip
    assert not loaded & slow


def test_drop_path_is_left_out_for_models_without_it(monkeypatch, capsys):
    def build_vgg(config):
        if "drop_path_rate" in config.arguments:
            raise UserError("unexpected keyword argument 'drop_path_rate'")
        return config

    monkeypatch.setattr(train.registry, "build_timm_model", build_vgg)
    c = types.SimpleNamespace(MODEL="vgg11", IMG_SIZE=32, MODEL_ARGS="", DROP_PATH_RATE=0.1)
    data = types.SimpleNamespace(classes=["a", "b"], channels=3)
    config, name, _ = train.build(c, data)
    assert (name, config.arguments) == ("vgg11", {"num_classes": 2, "in_chans": 3})
    assert c.DROP_PATH_RATE == 0
    assert "DROP_PATH_RATE=0.1 is not used" in capsys.readouterr().out
