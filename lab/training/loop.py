"""The only training loop of the project.

A script owns its model, data and optimizer; `fit` owns the rest: device, precision, processes,
schedule, mixing, clipping, validation, checkpoints, resuming, progress. What happens in a step
follows from (seed, epoch, step) alone, so a run that was stopped anywhere ends with the weights
of one that was not.
"""

import math
import signal
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from lab.core import Run, UserError, checkpoints, runtime
from lab.data.loaders import Loaders, derive_seed
from lab.models.lora import merge
from lab.models.profiling import peak_memory_mb
from lab.models.registry import save_model
from lab.training.config import FitConfig
from lab.training.evaluation import evaluate
from lab.training.mixing import Mixing
from lab.training.optimizers import Schedule
from lab.training.results import write_results
from lab.training.state import History, TrainState, epoch_line
from lab.training.tensorboard import TensorBoardLogger
from lab.training.trainee import Trainee, train_mode

# Steps between looks at the loss and at what other processes were told; each makes a GPU wait.
CHECK_EVERY = {"alone": 50, "together": 10}  # a launcher waits half a minute for a stop


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loaders: Loaders,
    config: FitConfig,
    run: Run,
) -> History:
    """Trains, validates after every epoch, tests the best epoch once, and keeps all records.

    Args:
        model: images (B, C, S, S) to logits (B, classes); on the CPU.
        optimizer: over the model's parameters; a group's `lr` is its peak rate.
        loaders: batches of the dataset.
        config: how to train.
        run: the folder for the records; a run that was stopped goes on from it.

    Returns: the rows of history.csv.
    Raises: UserError for a mistake that the user can mend; Stopped after Ctrl-C or SIGTERM.
    """
    if run.finished:
        run.say_finished()
        return run.history()
    trainer = Trainer(model, optimizer, loaders, config, run)
    advice = (
        f"Raise ACCUMULATION_STEPS (now {config.accumulation_steps}), which changes no result, or "
        f"lower BATCH_SIZE (now {loaders.batch_size}), IMG_SIZE ({loaders.preprocess.img_size}) "
        "or the model."
    )
    with runtime.explain_out_of_memory(advice), runtime.handle_signals() as stop:
        trainer.resume()
        while trainer.state.epoch <= config.epochs:
            trainer.train_epoch(stop)
            trainer.finish_epoch()
            if trainer.anywhere(stop) and trainer.state.epoch <= config.epochs:
                trainer.leave(stop)
        if not config.trial:
            trainer.test()
    return trainer.state.history


class Trainer:
    """The parts of `fit`, around what they share."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        loaders: Loaders,
        config: FitConfig,
        run: Run,
    ):
        self.config, self.loaders, self.run = config, loaders, run
        runtime.process_state()  # before Accelerate looks for them itself
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        self.alone = self.accelerator.num_processes == 1
        device = self.accelerator.device
        loaders.to(device, self.accelerator.process_index, self.accelerator.num_processes)
        self.schedule = Schedule(
            steps := config.epochs * loaders.steps,
            int(config.warmup_fraction * steps),
            config.lr_schedule,
        )
        self.mixing = Mixing(config, len(loaders.data.classes), self.accelerator)
        self.trainee = Trainee(model, optimizer, config, self.accelerator)
        self.model, self.optimizer = self.trainee.model, self.trainee.optimizer
        self.state = TrainState()
        self.board: TensorBoardLogger | None = None

    def resume(self) -> None:
        """Takes up the state that the run's folder holds, if any."""
        kind = "bf16" if self.config.mixed_precision == "bf16" else "fp32"
        count = sum(p.numel() for p in self.trainee.plain.parameters())
        where = f"{self.accelerator.num_processes} x {self.accelerator.device.type}, {kind}"
        self.say(f"{self.loaders.data.describe()}\n{count:,} parameters on {where}")
        if small := self.config.small_epochs:
            how = f"train on images of {self.config.small_size} pixels; validation is at full size"
            self.say(f"epochs 1 to {small} {how}")
        path = self.run.folder / "last.pt"
        if path.exists():
            saved = checkpoints.load_state(path)
            self.trainee.load(saved, path)
            self.state = TrainState(**saved["state"])
            at = f"epoch {self.state.epoch}, step {self.state.step + 1}"
            self.say(f"going on at {at} of {self.loaders.steps}: {self.run.folder}")
        if self.accelerator.is_main_process:
            self.run.write_history(self.state.history)
            if self.config.tensorboard:
                self.board = TensorBoardLogger(self.run.folder, self.state.epoch)
        self.accelerator.wait_for_everyone()
        if self.anywhere(not (self.run.folder / "history.csv").exists()):
            raise UserError(f"not all processes see the files of the first in {self.run.folder}: "
                            "several machines need a RESULTS_DIR that they share")  # fmt: skip

    def save(self) -> None:
        saved = {**self.trainee.state(), "state": asdict(self.state)}
        checkpoints.save_state(self.run.folder / "last.pt", saved)

    def anywhere(self, here: object) -> bool:
        """Whether it is so in any process: what one does then, all must, or wait for ever."""
        there = torch.tensor(float(bool(here)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(there) > 0)

    def leave(self, stop: list[int]) -> None:
        self.save()
        at = f"epoch {self.state.epoch}, step {self.state.step}"
        raise runtime.Stopped(stop[0] if stop else signal.SIGTERM, f"{at}: {self.run.folder}")

    def train_epoch(self, stop: list[int]) -> None:
        """The steps of the running epoch that are still to do."""
        state, config, device = self.state, self.config, self.accelerator.device
        # They are those of all processes: one alone takes up what a stopped run had counted.
        before = state.totals if self.accelerator.is_main_process else [0.0, 0.0, 0.0]
        totals = torch.tensor(before, device=device)
        losses: list[Tensor] = []
        look = 1 if device.type == "cpu" else CHECK_EVERY["alone" if self.alone else "together"]
        started = time.perf_counter() - state.seconds
        train_mode(self.model)
        bar = tqdm(
            desc=f"epoch {state.epoch}/{config.epochs}", total=self.loaders.steps,
            initial=state.step, leave=False, disable=config.trial or None, unit=" steps",
        )  # fmt: skip
        for images, labels in self.loaders.train(state.epoch, state.step):
            loss, correct = self.step(images, labels)
            n = len(images)
            totals += torch.stack([loss * n, correct, torch.full_like(loss, n)])
            losses.append(loss)
            state.step += 1
            bar.update()
            told = self.alone and bool(stop)
            if state.step % look == 0 or state.step == self.loaders.steps:
                told = self.check(losses, stop)
                losses.clear()
            if told:
                break
        bar.close()
        state.totals = self.accelerator.reduce(totals).tolist()
        state.seconds = time.perf_counter() - started
        if state.step < self.loaders.steps:
            self.leave(stop)

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step: mean loss and number of right answers of this process's images."""
        state, config = self.state, self.config
        done = (state.epoch - 1) * self.loaders.steps + state.step
        self.seed(0)  # batches are mixed alike in all processes; each drops at random on its own
        images, targets = self.mixing(images, labels)
        if state.epoch <= config.small_epochs:
            images = F.adaptive_avg_pool2d(images, config.small_size)
        if rank := self.accelerator.process_index:
            self.seed(rank)
        self.schedule.set(self.optimizer, done)
        loss = correct = torch.zeros((), device=images.device)
        parts = min(config.accumulation_steps, len(images))
        for i, (x, y) in enumerate(
            zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
        ):
            with self.accelerator.no_sync(self.model) if i + 1 < parts else nullcontext():
                logits = self.model(x)
                part = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
                part = part * (len(x) / len(images))
                self.accelerator.backward(part)
            loss = loss + part.detach()
            correct = correct + (logits.argmax(1) == (y if y.ndim == 1 else y.argmax(1))).sum()
        if config.clip_grad:
            self.accelerator.clip_grad_norm_(self.model.parameters(), config.clip_grad)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.trainee.ema:
            self.trainee.ema.update(self.trainee.plain, step=done)
        return loss, correct

    def seed(self, rank: int) -> None:
        """Lets the draws of this step follow from what it is; they may differ by process."""
        # torch.manual_seed looks for devices of every kind, a quarter of a small head's step.
        seeded = torch.default_generator if self.accelerator.device.type == "cpu" else torch
        seeded.manual_seed(derive_seed(self.config.seed, self.state.epoch, self.state.step, rank))

    def check(self, losses: list[Tensor], stop: list[int]) -> bool:
        """Stops at the first loss, of any process, that is not finite.

        Returns: whether any process was told to stop.
        """
        values = torch.stack([*losses, torch.full_like(losses[0], bool(stop))])
        *values, told = (values if self.alone else self.accelerator.reduce(values)).tolist()
        bad = next((i for i, value in enumerate(values) if not math.isfinite(value)), None)
        if bad is not None:
            raise UserError(
                f"the loss became {values[bad]} in epoch {self.state.epoch}, step "
                f"{self.state.step - len(losses) + bad + 1}, at learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.2g}. Lower LEARNING_RATE, or raise "
                "WARMUP_FRACTION, or set CLIP_GRAD to 1."
            )
        return told > 0

    def finish_epoch(self) -> None:
        """Validates, writes the epoch's row, keeps the weights if they are the best so far."""
        state, (loss, correct, images) = self.state, self.state.totals
        self.trainee.agree()
        scores = evaluate(self.trainee.judged, self.loaders, "val", self.accelerator)
        group = self.optimizer.param_groups[0]
        row = {
            "epoch": state.epoch,
            "learning_rate": float(f"{group['lr'] / group.get('lr_scale', 1):.4g}"),
            "train_loss": round(loss / images, 6),
            "train_accuracy": round(correct / images, 6),
            "val_loss": round(scores.loss, 6),
            "val_accuracy": round(scores.accuracy, 6),
            "seconds": round(state.seconds, 3),
            "images_per_second": round(images / state.seconds, 1),
            "peak_memory_mb": peak_memory_mb(self.accelerator.device),
            "images": int(images),
        }
        better = state.close_epoch(row)
        # In this order a kill between two lines is mended by the epoch that is run again.
        if better:
            path, loaders = self.run.folder / "best.safetensors", self.loaders
            save_model(path, self.trainee.judged, loaders.data.classes, loaders.preprocess, row)
        if self.accelerator.is_main_process:
            self.run.append_history(row)
        if self.board:
            self.board.add(row)
        if not self.config.trial or state.epoch > self.config.epochs:
            self.save()  # a trial is cheap: one that was killed starts over
        self.say(epoch_line(row, self.config.epochs))

    def test(self) -> None:
        """The test split, once, with the weights of the best validation epoch."""
        path = self.run.folder / "best.safetensors"
        self.accelerator.wait_for_everyone()
        merge(self.trainee.plain)
        checkpoints.load_strict(self.trainee.plain, checkpoints.load_weights(path)[0], path)
        scores = evaluate(self.trainee.plain, self.loaders, "test", self.accelerator)
        if self.accelerator.is_main_process:
            state = self.state
            write_results(self.run, scores, self.loaders.data, state.history, state.best_epoch)
            self.say(self.run.summary())

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process and not self.config.trial:
            tqdm.write(text)
