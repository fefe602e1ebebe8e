"""What the training loop works with: model, optimizer, batches, checkpoints, and the processes."""

import copy
import os
import signal
import time
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import DistributedType
from accelerate.utils import broadcast
from torch import Tensor, nn
from tqdm import tqdm

from lab.core import Run, UserError, checkpoints, machine, runtime
from lab.data import Loaders
from lab.models import lora, save_model
from lab.training.config import FitConfig, precision_name
from lab.training.mixing import Mixing
from lab.training.optimizers import Schedule
from lab.training.results import Predictions, TensorBoardLogger
from lab.training.snapshots import resolve_count, save_snapshot, snapshot_epochs
from lab.training.state import EMA, TrainState

# Seconds between two saves. The state of ViT-B takes 1.4 GB, and writing it can take longer than an
# epoch on a GPU. If the process is killed, the current epoch and at most this much training before
# it are lost; Ctrl-C and SIGTERM save first and lose nothing.
SAVE_INTERVAL = 60.0


class Trainer:
    """The state of a training run, in one process or in several that share each batch.

    All randomness of a step is derived from (seed, epoch, step). A run that is interrupted
    anywhere and resumed therefore ends with the same weights as an uninterrupted run.

    Attributes:
        model: the model that is trained and saved.
        train_model: `model` with Accelerate's wrappers for precision and processes.
        eval_model: the model that is validated and tested: the EMA if there is one, else `model`.
        optimizer: the optimizer of the model's parameters.
        ema: the exponential moving average of the weights, or None.
        schedule: the learning rate by step.
        loaders: the batches of the dataset, on the device.
        accelerator: devices, precision and processes.
        state: the position in the run.
        signals: numbers of the signals received, such as SIGINT after Ctrl-C.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loaders: Loaders,
        config: FitConfig,
        run: Run,
    ):
        _refuse_sharding()
        self.model, self.loaders, self.config, self.run = model, loaders, config, run
        self.accelerator = runtime.make_accelerator(config.mixed_precision)
        device, world = self.accelerator.device, self.accelerator.num_processes
        machine.reset_peak_memory(device)
        loaders.to(device, self.accelerator.process_index, world)
        self.mixing = Mixing(config, len(loaders.data.classes), self.accelerator)
        steps = config.epochs * loaders.steps
        self.schedule = Schedule(steps, int(config.warmup_fraction * steps), config.lr_schedule)
        self.state = TrainState()
        self.signals: list[int] = []
        count = resolve_count(config.snapshots, model)
        self._snapshot_epochs = snapshot_epochs(config.epochs, count)
        self._tensorboard: TensorBoardLogger | None = None
        self._saved_at = time.monotonic()
        # The best model and its row of the history, until both are written with the state.
        self._unsaved_best: tuple[nn.Module, dict[str, Any]] | None = None

        model.to(device)
        if device.type == "cuda":
            torch.backends.cudnn.benchmark = True  # worthwhile because shapes do not change
            model.to(memory_format=torch.channels_last)  # the faster layout for convolutions
        self.ema = EMA(model, config.ema_decay) if config.ema_decay else None
        self.eval_model = self.ema.model if self.ema else model
        if config.compile:
            # Each run of this process would add programs, up to a limit of torch.compile.
            torch.compiler.reset()
            # Compile once per image size: a single program for both sizes slows the large one.
            model.compile(dynamic=False if config.small_epochs else None)
        # The model is on its device. To decide that, the default imports torch.distributed.tensor.
        self.train_model = self.accelerator.prepare_model(model, device_placement=False)
        self.optimizer = optimizer
        single = self.accelerator.distributed_type == DistributedType.NO
        if not single or self.accelerator.scaler:
            # Wrap only if needed: the wrapper takes as long as the step of a small head. It
            # divides the gradients by the loss scale of fp16, and skips steps that overflow.
            self.optimizer = self.accelerator.prepare(optimizer)

    # --- Batches ---

    @property
    def global_step(self) -> int:
        """Optimizer steps completed since the start of the run."""
        return (self.state.epoch - 1) * self.loaders.steps + self.state.step

    def batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The remaining batches of the current epoch, as this process sees them.

        Yields: augmented and normalized images (b, C, H, W) and their targets: labels (b,), or
            class probabilities (b, classes) if mixup or cutmix mixed the batch.
        """
        state, config, rank = self.state, self.config, self.accelerator.process_index
        for images, labels in self.loaders.train(state.epoch, state.step):
            self._seed_step(0)  # the same seed in all processes, so that they mix alike
            images, targets = self.mixing(images, labels)
            if state.epoch <= config.small_epochs:
                images = F.adaptive_avg_pool2d(images, config.small_size)
            if rank:
                self._seed_step(rank)  # dropout differs between processes
            yield images, targets

    def _seed_step(self, rank: int) -> None:
        """Seeds PyTorch for the current step."""
        # torch.manual_seed checks every device type, a quarter of the time of a small head's step.
        generator = torch.default_generator if self.accelerator.device.type == "cpu" else torch
        seed = self.loaders.step_seed(self.state.epoch, self.state.step, rank)
        generator.manual_seed(seed)

    def split_batch(
        self, images: Tensor, targets: Tensor
    ) -> Iterator[tuple[Tensor, Tensor, float]]:
        """Splits a batch into at most `accumulation_steps` parts.

        Yields: images, targets, and their fraction of the batch.
        """
        device = self.accelerator.device
        parts = min(self.config.accumulation_steps, len(images))
        pairs = zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
        for i, (x, y) in enumerate(pairs, 1):
            # Processes average their gradients once, during the last backward pass of a step.
            last = i == parts
            sync = nullcontext() if last else self.accelerator.no_sync(self.train_model)
            with sync, machine.allow_tf32(device):
                yield x, y, len(x) / len(images)

    # --- The end of an epoch, and of the run ---

    def sync_buffers(self) -> None:
        """Gives all processes the batch-norm statistics of the first, so that they agree."""
        for buffer in self.eval_model.buffers():
            broadcast(buffer)

    def finish_epoch(self, val: Predictions) -> None:
        """Records the epoch, and saves the state if a minute has passed or the run is complete.

        Raises: Stopped, if a process was interrupted meanwhile and epochs remain.
        """
        state, (loss, correct, images) = self.state, self.state.totals
        group = self.optimizer.param_groups[0]
        row = {
            "epoch": state.epoch,
            "learning_rate": float(f"{group['lr'] / group.get('lr_scale', 1):.4g}"),
            "train_loss": round(loss / images, 6),
            "train_accuracy": round(correct / images, 6),
            "val_loss": round(val.loss, 6),
            "val_accuracy": round(val.accuracy, 6),
            "seconds": round(state.seconds, 3),
            "images_per_second": round(images / state.seconds, 1),
            "peak_memory_mb": machine.peak_memory_mb(self.accelerator.device),
            "images": int(images),
        }
        is_best = state.finish_epoch(row)
        if row["epoch"] in self._snapshot_epochs:
            save_snapshot(self.run.folder, self.eval_model, row["epoch"], row["val_accuracy"])
        if self.accelerator.is_main_process:
            self.run.append_history(row)
        if self._tensorboard:
            self._tensorboard.add(row)
        is_last = state.epoch > self.config.epochs
        # Trials are short: an interrupted one starts over.
        is_due = not self.config.trial and time.monotonic() - self._saved_at >= SAVE_INTERVAL
        if is_best and self.accelerator.is_main_process:
            keeps_changing = not (is_last or is_due)
            self._unsaved_best = (
                _copy_on_cpu(self.eval_model) if keeps_changing else self.eval_model,
                row,
            )
        if is_last or is_due:
            self.save()
        self.log(_epoch_line(row, self.config.epochs))
        left = (self.config.epochs - row["epoch"]) * row["seconds"]
        # The first epoch may include compilation.
        if row["epoch"] == 2 and left > 600 and not self.config.small_epochs:
            time_left = f"{left / 3600:.1f} hours" if left > 5400 else f"{left / 60:.0f} minutes"
            self.log(f"about {time_left} for the remaining epochs; --epochs changes their number")
        if self.any_process(self.signals) and not is_last:
            self.save_and_exit()

    def load_best_weights(self) -> None:
        """Loads the weights of the best validation epoch into `model`."""
        path = self.run.folder / "best.safetensors"
        self.accelerator.wait_for_everyone()
        lora.merge(self.model)
        try:
            checkpoints.load_strict(self.model, checkpoints.load_weights(path)[0], path)
        except UserError as error:
            raise UserError(f"{error}; --overwrite starts the run over") from error

    # --- Saving and resuming ---

    def resume(self) -> None:
        """Loads the state in the run's folder, if there is one, and prints what will be trained."""
        self._log_header()
        path = self.run.folder / "last.pt"
        if path.exists():
            saved = checkpoints.load_state(path)
            precision = self.config.mixed_precision
            if saved.get("precision", precision) != precision:
                raise UserError(
                    f"this run was started in {precision_name(saved['precision'])}, and this "
                    f"machine would continue in {precision_name(precision)}: resume it where it "
                    "was started, or start over with --overwrite"
                )
            checkpoints.load_strict(self.model, saved["model"], path)
            try:
                self.optimizer.load_state_dict(saved["optimizer"])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"{path} does not fit the optimizer ({runtime.first_line(error)}): undo the "
                    "change of the code, or start over with --overwrite"
                ) from error
            _match_layouts(self.optimizer)
            if self.ema:
                checkpoints.load_strict(self.ema.model, saved["ema"], path)
            if self.accelerator.scaler:
                self.accelerator.scaler.load_state_dict(saved["scaler"])
            self.state = TrainState(**saved["state"])
            at = f"epoch {self.state.epoch}, step {self.state.step + 1} of {self.loaders.steps}"
            if self.state.epoch > self.config.epochs:
                at = "the test of the best epoch, because all epochs are complete"
            self.log(f"resuming at {at}: {self.run.folder}")
        elif 0 in self._snapshot_epochs:
            save_snapshot(self.run.folder, self.eval_model, epoch=0)
        if self.accelerator.is_main_process:
            self.run.write_history(self.state.history)
            if self.config.tensorboard:
                self._tensorboard = TensorBoardLogger(self.run.folder, self.state.epoch)
        self.accelerator.wait_for_everyone()
        if self.any_process(not (self.run.folder / "history.csv").exists()):
            raise UserError(
                f"some processes cannot see the files in {self.run.folder}. On several machines, "
                "RESULTS_DIR must be a folder that they share"
            )

    def save(self) -> None:
        """Writes the best weights so far, and last.pt, from which `resume` continues.

        The state is written last: if the process is killed in between, the epoch is repeated.
        """
        if self._unsaved_best:
            (model, row), loaders = self._unsaved_best, self.loaders
            path = self.run.folder / "best.safetensors"
            save_model(path, model, loaders.data.classes, loaders.preprocess, row)
            self._unsaved_best = None
        scaler = self.accelerator.scaler
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.model.state_dict() if self.ema else None,
            "scaler": scaler.state_dict() if scaler else None,
            "precision": self.config.mixed_precision,
            "state": asdict(self.state),
        }
        checkpoints.save_state(self.run.folder / "last.pt", state)
        self._saved_at = time.monotonic()

    def save_and_exit(self) -> None:
        """Saves an interrupted run and raises Stopped."""
        self.save()
        self._stop(f"epoch {self.state.epoch}, step {self.state.step}")

    def stop_after_the_run(self) -> None:
        """Raises Stopped if a signal came too late to stop the run, so that no other one starts."""
        if self.any_process(self.signals):
            self._stop("the end of the run")

    def _stop(self, at: str) -> None:
        number = self.signals[0] if self.signals else signal.SIGTERM  # another process received it
        raise runtime.Stopped(number, f"{at}: {self.run.folder}")

    def any_process(self, condition: object) -> bool:
        """Whether a condition holds in any process. All processes must call it together."""
        here = torch.tensor(float(bool(condition)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(here) > 0)

    # --- Messages ---

    def _log_header(self) -> None:
        kind = precision_name(self.config.mixed_precision)
        count = sum(p.numel() for p in self.model.parameters())
        where = f"{self.accelerator.num_processes} x {self.accelerator.device.type}, {kind}"
        self.log(f"{self.loaders.data.describe()}\n{count:,} parameters on {where}")
        if self.config.small_epochs:
            self.log(
                f"epochs 1 to {self.config.small_epochs} train on images of "
                f"{self.config.small_size} pixels; validation uses the full size"
            )
        elif share := self.config.progressive_resize:
            self.log(
                f"PROGRESSIVE_RESIZE={share} of {self.config.epochs} epochs is less than one, so "
                "all epochs train on images of the full size"
            )

    def log(self, text: str) -> None:
        """Prints text once, above the progress bar; trials of a sweep print nothing."""
        if self.accelerator.is_main_process and not self.config.trial:
            tqdm.write(text)


def memory_advice(config: FitConfig, loaders: Loaders) -> str:
    """What to change if memory runs out."""
    return (
        f"Raise ACCUMULATION_STEPS (now {config.accumulation_steps}), which keeps the batch size, "
        f"or lower BATCH_SIZE (now {loaders.batch_size}), IMG_SIZE (now "
        f"{loaders.preprocess.img_size}) or the size of the model."
    )


def _copy_on_cpu(model: nn.Module) -> nn.Module:
    """A copy of a model that takes no memory of the GPU, not even for a moment."""
    tensors = [*model.parameters(), *model.buffers()]
    return copy.deepcopy(model, {id(x): _like(x) for x in tensors})


def _like(x: Tensor) -> Tensor:
    """A copy on the CPU, of the same class."""
    value = x.detach().to("cpu", copy=True)
    return nn.Parameter(value, x.requires_grad) if isinstance(x, nn.Parameter) else value


def _match_layouts(optimizer: torch.optim.Optimizer) -> None:
    """Gives the state of each parameter the parameter's memory layout, which fused steps require.

    They differ after a move between a CPU and a GPU, where filters are stored channels-last.
    """
    for parameter, state in optimizer.state.items():
        for name, value in state.items():
            if value.shape == parameter.shape and value.stride() != parameter.stride():
                state[name] = torch.empty_like(parameter, dtype=value.dtype).copy_(value)


def _epoch_line(row: dict[str, Any], epochs: int) -> str:
    """A row of the history for the terminal."""
    return (
        f"epoch {row['epoch']:>3}/{epochs}"
        f"  train loss {row['train_loss']:.3f} acc {100 * row['train_accuracy']:5.1f} %"
        f"  val loss {row['val_loss']:.3f} acc {100 * row['val_accuracy']:5.1f} %"
        f"  lr {row['learning_rate']:.1e}  {row['images_per_second']:,.0f} images/s"
    )


def _refuse_sharding() -> None:
    """Raises UserError if Accelerate is configured to split the model over processes."""
    for name in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "false").lower() in ("true", "1"):
            raise UserError(
                f"only data-parallel training is supported, but Accelerate is configured for "
                f"{name}. Launch with torchrun, or run `accelerate config` again without it"
            )
