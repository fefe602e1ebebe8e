"""A results folder with real runs of every kind that the report compares, and report.py."""

import shutil

import pytest
from filelock import FileLock

import cnn_baseline
import finetune
import report
import train

TINY = ("--dataset", "digits", "--embed-dim", "16", "--depth", "2", "--num-heads", "2",
        "--epochs", "2", "--precision", "fp32")  # fmt: skip


@pytest.fixture(scope="session")
def trained(tmp_path_factory, worker_id):
    """ViT and CNN twin with two seeds each, a ViT on 10 % of the images, and three modes of it.

    The processes that share the tests share these runs.
    """
    base = tmp_path_factory.getbasetemp()
    place = (base if worker_id == "master" else base.parent) / "report" / "results"
    with FileLock(place.parent.with_suffix(".lock")):
        if not place.parent.exists():
            part = place.parent.with_suffix(".part")  # of a worker whose training failed
            shutil.rmtree(part, ignore_errors=True)
            train_all(part / "results")
            part.rename(place.parent)
    return place


def train_all(place):
    def run(script, folder, *flags):
        constants = {module: dict(vars(module)) for module in (train, cnn_baseline, finetune)}
        with pytest.MonkeyPatch.context() as patch:
            flags = ["--results-dir", str(place / folder), *flags]
            patch.setattr("sys.argv", [f"{script.__name__}.py", *flags])
            patch.setattr("os.getloadavg", lambda: (0.5, 0.5, 0.5))  # else times may be left out
            script.main()
        for module, values in constants.items():
            vars(module).update(values)

    run(train, "train", *TINY, "--num-seeds", "2")
    run(train, "official/train", *TINY)
    run(train, "train", *TINY, "--train-fraction", "0.1")
    run(cnn_baseline, "cnn_baseline", *TINY, "--num-seeds", "2")
    vit = place / "train" / "digits-vit_16x2-s0"
    vit_flags = ("--pretrained", str(vit), "--data-dir", str(place.parent / "data"))
    for mode in ("head", "full", "scratch"):
        run(finetune, "finetune", *vit_flags, "--mode", mode, "--dataset", "digits", "--epochs",
            "1", "--train-fraction", "0.5", "--precision", "fp32")  # fmt: skip


@pytest.fixture
def place(trained, tmp_path):
    """A copy of the results that a test may change."""
    shutil.copytree(trained, tmp_path / "results")
    return tmp_path / "results"


@pytest.fixture
def run_report(monkeypatch):
    """Runs report.py with flags."""
    constants = {name: value for name, value in vars(report).items() if name.isupper()}

    def run(*flags):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, flags)])
        report.main()

    yield run
    vars(report).update(constants)
