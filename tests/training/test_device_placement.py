"""Device placement without a GPU: see pretend_gpu.py, which needs a process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

HERE = Path(__file__).parent
LAUNCHES = 600  # per step of a model of two blocks, with every kind of augmentation

pytestmark = pytest.mark.skipif(
    not hasattr(torch._C, "_acc")
    or not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason=f"PyTorch {torch.__version__} has no backends written in Python",
)


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What check_placement.py reports."""
    words = [sys.executable, HERE / "check_placement.py", tmp_path_factory.mktemp("placement")]
    done = subprocess.run(words, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout.splitlines()[-1])


def test_scripts_finish_on_a_gpu(found):
    assert len(found["scripts"]) == 10
    assert set(found["scripts"].values()) == {""}, found["scripts"]


def test_the_fp32_history_on_a_gpu_equals_that_on_a_cpu(found):
    (ours,), (theirs,) = found["gpu"], found["cpu"]
    for name in ("learning_rate", "train_loss", "train_accuracy", "val_loss", "val_accuracy"):
        assert ours[name] == pytest.approx(theirs[name], abs=1e-6), name


def test_a_training_step_makes_the_host_wait_for_nothing(found):
    """The images are copied once, and the losses are read at the end of an epoch."""
    assert set(found["waits"].values()) == {1}, found["waits"]
    places = {line.split(":")[0] for line in found["waits"]}
    assert places == {"lab/data/loaders.py", "lab/training/progress.py"}


def test_a_step_stays_within_its_budget_of_kernel_launches(found):
    assert LAUNCHES / 2 < found["launches"] <= LAUNCHES


@pytest.mark.parametrize(("mistake", "line"), [
    ("mean of the images", "lab/data/loaders.py"),
    ("labels", "lab/data/loaders.py"),
    ("moving average", "lab/training/state.py"),
    ("random numbers", "lab/data/augment.py"),
    ("position embedding", "model.py"),
    ("item() of the loss", "lab/training/loop.py"),
    ("item() in the model", "model.py"),
])  # fmt: skip
def test_planted_mistakes_are_caught_and_located(found, mistake, line):
    assert line in found["caught"][mistake]
