"""Runs the scripts and the training loop on the pretend GPU; prints what happened as JSON.

python tests/training/check_placement.py FOLDER
"""

import contextlib
import dataclasses
import io
import json
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import pretend_gpu as gpu
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import model as vit
from lab.core import Run, runtime
from lab.data import Augmentation, Loaders, Preprocess, augment, load_data, loaders
from lab.models import profile_model
from lab.training import FitConfig, fit, optimizers, progress, state, trainer
from tests.figures import blank_figures

ROOT = Path(__file__).resolve().parents[2]
STEPS = 4
SIZES = ["--embed-dim", "16", "--depth", "1", "--num-heads", "2"]
SHORT = ["--dataset", "digits", "--epochs", "1", "--train-fraction", "0.1",  # three steps
         "--batch-size", "400"]  # fmt: skip
SWIN = ["--model-args", "patch_size=1 window_size=4 embed_dim=8 depths=(1,1) num_heads=(1,2)"]
HEAD = [*SHORT, "--learning-rate", "0.01", "--weight-decay", "0"]
RICH = ["--auto-augment", "trivial", "--random-erasing", "0.3", "--mixup", "0.5", "--cutmix", "1",
        "--mix-probability", "0.7", "--ema-decay", "0.9", "--accumulation-steps", "2",
        "--optimizer", "muon"]  # fmt: skip
SCRIPTS = {
    "train.py": [*SIZES, *SHORT, *RICH],
    "train.py --model swin_tiny_patch4_window7_224": [*SHORT, *SWIN],
    "cnn_baseline.py": [*SIZES, *SHORT],
    "finetune.py --mode full": ["--pretrained", "{run}", *SHORT],
    "finetune.py --mode head": ["--pretrained", "{run}", *HEAD],
    "finetune.py --mode lora": ["--pretrained", "{run}", *SHORT],
    "finetune.py --mode top-k --top-k 1": ["--pretrained", "{run}", *SHORT],
    "finetune_swin.py --mode head": ["--model", "{swin}", *HEAD],
    "attention_viz.py": ["--model", "{run}"],
    "predict.py --attention": ["--model", "{run}"],
}


def to_device(x: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    """Copies do not block, as on CUDA; the project allows that for devices of that name only."""
    return x.to(device, non_blocking=True)


def use(device: torch.device) -> None:
    """Makes a device the one that scripts choose."""
    runtime.process_state().device = device


def run_scripts(place: Path) -> dict[str, str]:
    """Each script's error, or an empty text if it finished on the GPU."""
    found = {}
    for command, words in SCRIPTS.items():
        script, *flags = command.split()
        run, swin = (next((place / "train.py").glob(f"*-{n}_*"), "") for n in ("vit", "swin"))
        flags += ["--results-dir", str(place / script), "--data-dir", str(place / "data")]
        sys.argv = [
            str(ROOT / script),
            *flags,
            *(word.format(run=run, swin=swin) for word in words),
        ]
        try:
            with contextlib.redirect_stdout(io.StringIO()), gpu.Watch() as watch:
                runpy.run_path(sys.argv[0], run_name="__main__")
            found[command] = "" if watch.launches else "it did not use the GPU"
        except (Exception, SystemExit) as error:
            found[command] = repr(error)
    return found


def train(folder: Path) -> list[dict]:
    """Trains a small model for one epoch of STEPS steps; returns its history."""
    data = load_data("digits")
    torch.manual_seed(0)
    config = vit.ViTConfig(8, 4, 1, 10, embed_dim=16, depth=2, num_heads=2, drop_path_rate=0.1)
    model = vit.VisionTransformer(config)
    settings = FitConfig(1, ema_decay=0.9, clip_grad=1.0, precision="fp32", mixup=0.2)
    facts = {"model": profile_model(model, (1, 8, 8)), "dataset": data.summary()}
    run = Run.open(folder, "run", dataclasses.asdict(settings), facts, False)
    augmentation = Augmentation(1, rotate=10, auto_augment="trivial", random_erasing=0.2)
    preprocess = Preprocess(8, data.mean, data.std)
    batches = Loaders(data, preprocess, len(data.train) // STEPS, augmentation)
    return fit(model, optimizers.adamw(model, 1e-3, 0.05), batches, settings, run)


def watched_training(folder: Path) -> tuple[list[dict], dict[str, int], float]:
    """Trains on the GPU. Returns: history, waits by line during the steps, launches per step."""
    waits: dict[str, int] = {}
    launches = []
    original = trainer.Trainer.batches

    def batches(self):
        before = gpu.Watch.current.waits.copy(), gpu.Watch.current.launches
        for batch in original(self):
            yield batch  # the rest of the step happens here
            watch = gpu.Watch.current
            for (reason, line), count in (watch.waits - before[0]).items():
                waits[f"{line} {reason}"] = waits.get(f"{line} {reason}", 0) + count
            launches.append(watch.launches - before[1])
            before = watch.waits.copy(), watch.launches

    with mock.patch.object(trainer.Trainer, "batches", batches), gpu.Watch():
        history = train(folder)
    return history, waits, sum(launches[1:]) / len(launches[1:])  # the first step sets up


# --- Planted mistakes: each is one line that a GPU would punish ---


def wrap(owner: object, name: str, change: Callable) -> mock._patch:
    """Replaces a function by one that calls `change(original, *arguments)`."""
    original = getattr(owner, name)
    return mock.patch.object(owner, name, lambda *args, **kw: change(original, *args, **kw))


def mean_on_cpu(original, self, *arguments):
    original(self, *arguments)
    self.mean = self.mean.cpu()


def labels_on_cpu(original, self, *arguments):
    original(self, *arguments)
    self.labels = self.labels.cpu()


def average_on_cpu(original, self, *arguments):
    original(self, *arguments)
    self.model = self.model.cpu()


def random_numbers_on_cpu(original, self, *arguments):
    return original(self, *arguments).cpu()


def positions_on_cpu(original, self, x):
    return original(self, x) + torch.zeros(5, 16)


def item_in_loss(original, self, loss, logits, targets):
    original(self, loss, logits, targets)
    return loss.item()


def item_in_model(original, self, x):
    return original(self, x) if x.abs().max().item() > 0 else x


MISPLACED = {
    "mean of the images": (loaders.Loaders, "to", mean_on_cpu),
    "labels": (loaders.SplitLoader, "__init__", labels_on_cpu),
    "moving average": (state.EMA, "__init__", average_on_cpu),
    "random numbers": (augment.BatchRNG, "uniform", random_numbers_on_cpu),
    "position embedding": (vit.VisionTransformer, "embed", positions_on_cpu),
}
WAITING = {
    "item() of the loss": (progress.Progress, "add", item_in_loss),
    "item() in the model": (nn.GELU, "forward", item_in_model),
}


def caught(place: Path) -> dict[str, str]:
    """What was reported for each planted mistake; an empty text: it was not noticed."""
    found = {}
    for name, (owner, function, change) in {**MISPLACED, **WAITING}.items():
        try:
            with wrap(owner, function, change):
                _, waits, _ = watched_training(place / name)
            found[name] = ", ".join(line for line, count in waits.items() if count >= STEPS)
        except RuntimeError as error:
            found[name] = str(error)
    return found


def main(place: Path) -> None:
    use(gpu.CPU)
    result = {"cpu": train(place / "cpu")}
    use(gpu.DEVICE)
    with (
        mock.patch.object(augment, "to_device", to_device),
        mock.patch.object(loaders, "to_device", to_device),
    ):
        history, waits, launches = watched_training(place / "gpu")
        result |= {"gpu": history, "waits": waits, "launches": launches}
        result |= {"caught": caught(place / "planted"), "scripts": run_scripts(place / "scripts")}
    print(json.dumps(result))


if __name__ == "__main__":
    with blank_figures():
        main(Path(sys.argv[1]))
