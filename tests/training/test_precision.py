"""Number formats, loss scaling, and weights that are not finite, as far as a CPU can show them."""

import dataclasses
import mmap
import signal
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from lab.core import Run, UserError, machine, runtime
from lab.training import FitConfig, loop, progress, results, trainer
from lab.training.config import mixed_precision
from model import VisionTransformer
from tests.training import small
from tests.training.small import CONFIG, FP32

CLIPPED = dataclasses.replace(FP32, clip_grad=1.0)


@pytest.fixture
def train(data, tmp_path):
    """A function that trains a small model in the folder of that name; returns its last.pt."""
    return lambda name: small.last_state(small.train(data, tmp_path / name, CLIPPED)[2])


@pytest.fixture
def cuda(monkeypatch):
    """A function that makes the device look like a GPU with or without bf16, or like a CPU."""

    def pretend(has_bf16, device="cuda"):
        state = type("State", (), {"device": torch.device(device)})
        monkeypatch.setattr(runtime, "process_state", lambda: state)
        monkeypatch.setattr(machine, "has_bf16", lambda device: has_bf16)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")

    return pretend


def test_auto_selects_what_the_gpu_supports(cuda):
    cuda(has_bf16=True)
    chosen = [mixed_precision(p) for p in ("auto", "bf16", "fp16", "fp32")]
    assert chosen == ["bf16", "bf16", "fp16", "no"]
    cuda(has_bf16=False)
    assert mixed_precision("auto") == "fp16"


@pytest.mark.parametrize(
    ("cpu", "avx512_bf16", "amx", "precision"),
    [
        ("AMD EPYC 9B14", True, False, "bf16"),
        ("AMD EPYC 7B12", False, False, "no"),
        ("Intel(R) Xeon(R) Platinum 8481C", True, True, "bf16"),
        ("Intel(R) Xeon(R) Processor", True, False, "no"),  # has bf16, at half the speed of fp32
        ("arm64", False, False, "no"),
    ],
)
def test_auto_selects_what_is_faster_on_a_cpu(cpu, avx512_bf16, amx, precision, monkeypatch):
    monkeypatch.setattr(machine, "cpu_name", lambda: cpu)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512_bf16)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    assert mixed_precision("auto") == precision
    assert mixed_precision("bf16") == "bf16"


def test_emulated_bf16_and_fp16_on_a_cpu_are_refused(cuda):
    cuda(has_bf16=True, device="cpu")
    with pytest.raises(UserError, match="PRECISION=fp16 needs a CUDA GPU"):
        FitConfig(1, precision="fp16")
    cuda(has_bf16=False)
    with pytest.raises(UserError, match="Tesla T4 has no bf16 hardware"):
        FitConfig(1, precision="bf16")


class ScalingAccelerator(Accelerator):
    """Scales the loss as Accelerate does for fp16, which it allows only on a GPU."""

    def __init__(self, **kwargs):
        super().__init__(**kwargs)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=10)

    def unscale_gradients(self, optimizer=None):  # Accelerate's does nothing unless in fp16
        for prepared in self._optimizers:
            self.scaler.unscale_(prepared.optimizer)


def test_a_scaled_loss_gives_the_same_weights_and_resumes(train, monkeypatch):
    plain = train("plain")
    monkeypatch.setattr(runtime, "Accelerator", ScalingAccelerator)
    scaled = train("scaled")
    for name, value in plain["model"].items():
        if not name.endswith("qkv.bias"):  # the keys' bias has no gradient: Adam scales noise
            torch.testing.assert_close(scaled["model"][name], value, atol=1e-5, rtol=1e-4, msg=name)
    assert scaled["scaler"]["scale"] == 2.0**18, "it doubled after steps 10 and 20 of 24"

    finish_step = progress.Progress.finish_step

    def stop_at_step_15(self):
        if self._trainer.global_step == 15 and not self._trainer.signals:
            self._trainer.signals.append(signal.SIGINT)
        return finish_step(self)

    monkeypatch.setattr(progress.Progress, "finish_step", stop_at_step_15)
    with pytest.raises(runtime.Stopped):
        train("stopped")
    monkeypatch.setattr(progress.Progress, "finish_step", finish_step)
    resumed = train("stopped")
    assert resumed["scaler"] == scaled["scaler"]
    assert all(resumed["model"][name].equal(value) for name, value in scaled["model"].items())


@pytest.mark.parametrize("damage", ["precision", "optimizer"])
def test_a_state_that_does_not_fit_is_explained(damage, train, data, tmp_path):
    """As after a move to other hardware, or a change of the parameter groups."""
    state = train("run")
    (folder,) = (tmp_path / "run").iterdir()
    (folder / "metrics.json").unlink()
    if damage == "precision":
        state["precision"] = "fp16"
    else:
        state["optimizer"]["param_groups"].pop()
    torch.save(state, folder / "last.pt")
    says = {
        "precision": "started in fp16, and this machine would continue in fp32",
        "optimizer": "does not fit the optimizer",
    }
    with pytest.raises(UserError, match=says[damage]):
        train("run")


def test_runs_of_one_process_can_have_two_precisions():
    for precision in ("no", "bf16", "no"):
        assert runtime.make_accelerator(precision).mixed_precision == precision


def test_compiling_without_a_compiler_is_refused(monkeypatch):
    monkeypatch.setattr(machine.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match=r"COMPILE=True needs a C\+\+ compiler"):
        FitConfig(1, compile=True)


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the kernel cannot reset it")
def test_each_run_of_a_process_measures_its_own_peak_memory():
    cpu, size = torch.device("cpu"), 300 * 2**20
    with mmap.mmap(-1, size) as block:  # malloc could keep the memory of a freed tensor
        for start in range(0, size, mmap.PAGESIZE):
            block[start] = 1
        high = machine.peak_memory_mb(cpu)
    machine.reset_peak_memory(cpu)
    assert machine.peak_memory_mb(cpu) < high - 250


@pytest.mark.parametrize("bad", ["loss", "weights"])
def test_an_interrupted_run_never_saves_weights_that_are_not_finite(
    bad, train, tmp_path, monkeypatch
):
    """As on a GPU, where the loss is checked every 50 steps; the signal comes in between."""
    batches = trainer.Trainer.batches

    def broken_batches(self):
        for images, labels in batches(self):
            if self.state.step == 3:
                self.signals.append(signal.SIGTERM)
                if bad == "loss":
                    images = images * float("nan")
                else:  # a finite loss, after which the update overflows
                    self.optimizer.param_groups[0]["peak_lr"] = float("inf")
            yield images, labels

    monkeypatch.setattr(progress, "_check_interval", lambda accelerator: 50)
    monkeypatch.setattr(trainer.Trainer, "batches", broken_batches)
    message = "loss became nan" if bad == "loss" else "weights became NaN or infinite"
    with pytest.raises(UserError, match=rf"{message} in epoch 1, step 4"):
        train("run")
    assert not (tmp_path / "run" / "run" / "last.pt").exists()


def test_tf32_is_for_the_model_only(monkeypatch):
    """Inside the steps of the model, not while batches are augmented."""
    assert torch.get_float32_matmul_precision() == "highest"
    with machine.allow_tf32(torch.device("cuda")):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == "highest"
    with machine.allow_tf32(torch.device("cpu")):
        assert torch.get_float32_matmul_precision() == "highest"


def test_tf32_that_a_container_allows_everywhere_is_switched_off():
    torch.set_float32_matmul_precision("high")
    runtime.make_accelerator("no")
    assert torch.get_float32_matmul_precision() == "highest"


def test_more_processes_than_gpus_are_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    runtime.process_state()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(
        UserError, match=r"2 processes were started, but this machine has 1 GPU\(s\)"
    ):
        runtime.process_state()


@pytest.mark.parametrize(("capability", "header", "works"), [
    ((7, 5), True, True), ((6, 0), True, False), ((9, 0), False, False),
])  # fmt: skip
def test_compiling_needs_a_recent_gpu_and_pythons_header(
    capability, header, works, monkeypatch, tmp_path
):
    if header:
        (tmp_path / "Python.h").touch()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(machine, "has_compiler", lambda: True)
    monkeypatch.setattr(machine, "find_spec", lambda name: name)
    monkeypatch.setattr(machine.sysconfig, "get_path", lambda *_: str(tmp_path))
    assert machine.can_compile(torch.device("cuda")) == works
    assert not machine.can_compile(torch.device("cpu"))


@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused(name, train, monkeypatch):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(UserError, match=f"only data-parallel training.*{name}"):
        train("run")


def test_frozen_modules_stay_in_evaluation_mode():
    model = VisionTransformer(CONFIG)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    loop.train_mode(model)
    assert model.training
    assert model.head.training
    assert not model.blocks[0].attn.training


def test_a_damaged_record_of_another_run_does_not_stop_a_new_one(data, tmp_path):
    facts = {"model": {}, "dataset": data.summary()}
    for name in ("damaged", "new"):
        run = Run.open(tmp_path, name, {"EPOCHS": 2}, facts, False)
    (tmp_path / "damaged" / "metrics.json").touch()
    for content in ("{", "[]", '{"constants": null}', None):
        path = tmp_path / "damaged" / "config.json"
        path.unlink() if content is None else path.write_text(content)
        assert results.explain_more_epochs(run) is None
