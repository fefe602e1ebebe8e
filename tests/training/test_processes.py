"""Two processes train like one, whatever launches them; interrupted and misused."""

import contextlib
import csv
import io
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from lab.data.datasets import load_data
from lab.models.registry import load_model

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
LAUNCH = ["-m", "accelerate.commands.launch"]
ACCELERATE = [*LAUNCH, "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
              "--mixed_precision", "no", "--dynamo_backend", "no",
              "--main_process_port", "0"]  # fmt: skip
SMALL = ["--embed-dim", "32", "--depth", "2", "--batch-size", "64"]
# All that is drawn at random for an image, but for what the model drops. Of 257 validation images
# the first process has 129, two batches, the second 128, which is one.
TRAIN = ["train.py", *SMALL, "--epochs", "2", "--auto-augment", "trivial",
         "--random-erasing", "0.3",
         "--mixup", "0.5", "--cutmix", "1", "--mix-probability", "0.7", "--ema-decay", "0.9",
         "--accumulation-steps", "3", "--drop-path-rate", "0",
         "--val-fraction", "0.179"]  # fmt: skip
TEST_IMAGES = 359  # an odd number: two processes cannot take equally many
EVERYTHING = {
    "config.json", "history.csv", "metrics.json", "predictions.csv", "curves.png",
    "confusion.png", "best.safetensors", "last.pt",
}  # fmt: skip


def start(launcher, words, **environment):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.Popen(
        [sys.executable, *launcher, *words], cwd=ROOT, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def finished(process, timeout=180):
    """Status, stdout, stderr; the whole launch is gone afterwards, hung or not."""
    try:
        out, err = process.communicate(timeout=timeout)
        return process.returncode, out, err
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def launched(launcher, words, **environment):
    status, out, err = finished(start(launcher, words, **environment))
    assert status == 0, err
    return out


def alone(words):
    """A script in this process: what it prints."""
    out, before, place = io.StringIO(), sys.argv, os.getcwd()
    sys.argv = words
    os.chdir(ROOT)
    try:
        with contextlib.redirect_stdout(out):
            runpy.run_path(words[0], run_name="__main__")
    finally:
        sys.argv = before
        os.chdir(place)
    return out.getvalue()


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def assert_same_run(ours, theirs):
    """The same loss curve, every test image once, the same outcome, the same weights."""
    assert {p.name for p in ours.iterdir()} == {p.name for p in theirs.iterdir()} == EVERYTHING
    rows, expected = rows_of(ours / "history.csv"), rows_of(theirs / "history.csv")
    assert [row["epoch"] for row in rows] == [row["epoch"] for row in expected]
    for key, tolerance in (("train_loss", 1e-4), ("val_loss", 1e-4), ("learning_rate", 1e-9),
                           ("train_accuracy", 0.002), ("val_accuracy", 0.008),
                           ("images", 0)):  # fmt: skip
        curves = [[float(row[key]) for row in each] for each in (rows, expected)]
        assert curves[0] == pytest.approx(curves[1], abs=tolerance), key
    rows, expected = rows_of(ours / "predictions.csv"), rows_of(theirs / "predictions.csv")
    assert len(rows) == TEST_IMAGES
    assert [row["image"] for row in rows] == [row["image"] for row in expected]
    assert [row["label"] for row in rows] == [row["label"] for row in expected]
    confidence = [[float(row["confidence"]) for row in each] for each in (rows, expected)]
    assert confidence[0] == pytest.approx(confidence[1], abs=2e-3)
    weights, expected = (load_file(folder / "best.safetensors") for folder in (ours, theirs))
    assert weights.keys() == expected.keys()
    for name in weights:
        if not name.endswith("qkv.bias"):  # the keys' has no gradient, so Adam scales noise
            torch.testing.assert_close(weights[name], expected[name], atol=2e-3, rtol=0, msg=name)


def assert_said_once(ours, theirs):
    """The same lines, in the same order, but for clocks, folders and the number of processes."""

    def plain(text):
        text = re.sub(r"[\d,]+ images/s|[\d,]+ s of training|\S+/curves.png|\d x cpu", "", text)
        return re.sub(r"[\d.]+ s to compute", "", text).strip().splitlines()

    assert plain(ours) == plain(theirs)


def only(place):
    (folder,) = place.iterdir()
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """Folders of the runs of two seeds in one process, and what was printed."""
    place = tmp_path_factory.mktemp("one")
    out = alone([*TRAIN, "--num-seeds", "2", "--results-dir", str(place)])
    assert "257 validation, 359 test images" in out
    return sorted(place.iterdir()), out


def test_torchrun_trains_like_one_process(one, tmp_path):
    out = launched(TORCHRUN, [*TRAIN, "--results-dir", str(tmp_path)])
    assert_same_run(only(tmp_path), one[0][0])
    assert "on 2 x cpu" in out
    assert_said_once(out, one[1].split("--- seed 0 ---\n")[1].split("\n\n--- seed 1")[0])


def test_accelerate_launch_trains_like_one_process_seed_after_seed(one, tmp_path):
    out = launched(ACCELERATE, [*TRAIN, "--num-seeds", "2", "--results-dir", str(tmp_path)])
    folders = sorted(tmp_path.iterdir())
    assert [p.name for p in folders] == [p.name for p in one[0]]
    for ours, theirs in zip(folders, one[0], strict=True):
        assert_same_run(ours, theirs)
    assert_said_once(out, one[1])


def node(rank, place, port):
    launcher = ["-m", "torch.distributed.run", "--nnodes", "2", "--nproc-per-node", "1",
                "--node-rank", str(rank), "--rdzv-backend", "c10d", "--rdzv-id", "lab",
                "--rdzv-endpoint", f"127.0.0.1:{port}"]  # fmt: skip
    return start(launcher, [*TRAIN, "--results-dir", str(place)])


def free_port():
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]


def test_two_launchers_train_like_one_process(one, tmp_path):
    """As on two machines, which here are one."""
    port = free_port()
    nodes = [node(rank, tmp_path, port) for rank in (0, 1)]
    ends = [finished(process) for process in nodes]
    assert [status for status, _, _ in ends] == [0, 0], ends
    assert_same_run(only(tmp_path), one[0][0])
    said = sorted((out for _, out, _ in ends), key=len)
    assert said[0] == ""
    assert said[1].count("epoch   1/2") == 1


def test_machines_that_share_no_folder_are_told_so(tmp_path):
    port = free_port()
    nodes = [node(rank, tmp_path / str(rank), port) for rank in (0, 1)]
    for status, _, err in map(finished, nodes):
        assert status != 0
        assert err.count("RESULTS_DIR must be a folder that they share") == 1, err


def to_the_launcher(process):
    process.send_signal(signal.SIGTERM)


def to_all(process):
    """As a terminal's Ctrl-C; the launcher then passes it on to those who have it already."""
    os.killpg(process.pid, signal.SIGINT)


def to_one_worker_again_and_again(process):
    worker = psutil.Process(process.pid).children()[-1]
    with contextlib.suppress(psutil.NoSuchProcess):
        for _ in range(20):
            worker.send_signal(signal.SIGINT)
            time.sleep(0.02)


def stopped(launcher, words, send, signaled, **environment):
    """Starts a run and interrupts it inside its second epoch; returns the command that resumes.

    `signaled`: a path that the processes create when a signal arrives, see launched.py.
    """
    words = ["tests/training/launched.py", *words]
    process = start(launcher, words, HOLD=str(signaled), **environment)
    for line in process.stdout:
        if line == "held\n":
            break
    send(process)
    status, out, err = finished(process)
    assert status != 0
    assert err.count("stopping after this step") == (send is not to_one_worker_again_and_again), err
    (told,) = re.findall(r"stopped and saved at epoch (\d), step (\d+): .*\ngo on with: (.*)", err)
    assert not re.search(r"^epoch   2/", out, re.M), out
    assert told[0] == "2"
    assert 4 < int(told[1]) < 18
    return told[2]


def test_a_run_of_two_processes_goes_on_with_one(one, tmp_path):
    words = [*TRAIN, "--results-dir", str(tmp_path / "runs")]
    again = stopped(TORCHRUN, words, to_one_worker_again_and_again, tmp_path / "signaled")
    assert again == " ".join(["python", *TORCHRUN, "tests/training/launched.py", *words])
    assert "resuming at epoch 2, step" in alone(words)
    assert_same_run(only(tmp_path / "runs"), one[0][0])


def test_a_run_of_one_process_goes_on_with_two(one, tmp_path):
    words = [*TRAIN, "--results-dir", str(tmp_path / "runs")]
    again = stopped([], words, to_the_launcher, tmp_path / "signaled")
    assert again == " ".join(["python", *words])
    out = launched([*TORCHRUN, "tests/training/launched.py"], words)
    assert "resuming at epoch 2, step" in out
    assert_same_run(only(tmp_path / "runs"), one[0][0])


def test_ctrl_c_in_a_terminal_stops_two_processes(one, tmp_path):
    words = [*TRAIN, "--results-dir", str(tmp_path / "runs")]
    stopped(TORCHRUN, words, to_all, tmp_path / "signaled")
    load_model(only(tmp_path / "runs") / "best.safetensors")  # of the first epoch
    assert "resuming at epoch 2, step" in alone(words)
    assert_same_run(only(tmp_path / "runs"), one[0][0])


@pytest.mark.parametrize(("words", "sentence"), [
    (["--batch-size", "33"], "BATCH_SIZE=33 does not divide over 2 processes"),
    (["--dataset", "cats"], "DATASET='cats' is neither a folder nor one of digits"),
])  # fmt: skip
def test_a_mistake_is_told_once(tmp_path, words, sentence):
    status, _, err = finished(start(TORCHRUN, [*TRAIN, "--results-dir", str(tmp_path), *words]))
    assert status != 0
    assert err.count(sentence) == 1, err
    assert err.count("Traceback") == 1, err  # the launcher's own
    assert not list(tmp_path.glob("*/history.csv"))


def test_other_scripts_train_like_one_process(one, tmp_path):
    """Fine-tuning on cached features and in full; a CNN, as far as batch norm allows."""

    def words(place):
        data = ["--data-dir", str(tmp_path / place / "data"), "--precision", "fp32"]
        full = ["finetune.py", "--pretrained", str(one[0][0]), "--epochs", "2"]
        head = [*full, "--mode", "head", "--learning-rate", "0.01", "--weight-decay", "0"]
        cnn = ["cnn_baseline.py", *SMALL, "--epochs", "2", "--ema-decay", "0"]
        where = {"head": head, "full": full, "cnn": cnn}
        return [[*line, *data, "--results-dir", str(tmp_path / place / name)]
                for name, line in where.items()]  # fmt: skip

    expected = "".join(alone(line) for line in words("one"))
    together = [word for line in words("two") for word in [*line, "+"]]
    out = launched([*TORCHRUN, "tests/training/launched.py"], together)
    for name in ("head", "full"):
        ours, theirs = (only(tmp_path / place / name) for place in ("two", "one"))
        if name == "head":  # its runs, one for each rate and decay, are kept beside the records
            ours, theirs = copied(ours), copied(theirs)
        assert_same_run(ours, theirs)
    # Of the CNN's lines those before its first epoch: it is not trained alike, see below.
    assert_said_once(*(text.rsplit("epoch   1/2", 1)[0] for text in (out, expected)))
    assert out.count("epoch   1/2") == out.count("epoch   2/2") == 2

    folder = only(tmp_path / "two" / "cnn")
    rows = rows_of(folder / "history.csv")
    first, last = (rows_of(only(tmp_path / "one" / "cnn") / "history.csv")[i] for i in (0, 1))
    assert abs(float(rows[1]["val_loss"]) - float(last["val_loss"])) < abs(
        float(first["val_loss"]) - float(last["val_loss"])
    )
    model, header = load_model(folder / "best.safetensors")
    data = load_data("digits")
    images = (data.val.images(slice(None)) / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model(images), data.val.labels)
    kept = next(row for row in rows if int(row["epoch"]) == header["epoch"])
    assert float(kept["val_loss"]) == pytest.approx(loss.item(), abs=1e-4)


def copied(folder):
    """A head's folder as assert_same_run wants it: the state is that of the chosen head."""
    (trial,) = (folder / "sweep").iterdir()
    (trial / "last.pt").rename(folder / "last.pt")
    for path in [*trial.iterdir(), trial, folder / "sweep"]:
        path.rmdir() if path.is_dir() else path.unlink()
    return folder
