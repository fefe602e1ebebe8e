"""The only training loop of the project.

A script owns its model, data and optimizer; `fit` owns the rest: device, precision, processes,
schedule, mixing, clipping, validation, checkpoints, resuming, progress. What happens in a step
follows from (seed, epoch, step) alone, so a run that was stopped anywhere ends with the weights
of one that was not.
"""

import signal
import time
from contextlib import nullcontext
from dataclasses import asdict

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torchvision.transforms import v2
from tqdm import tqdm

from lab.board import Board
from lab.checkpoints import load_state, load_strictly, load_weights, save_state
from lab.compute import peak_memory_mb
from lab.errors import Stopped, UserError, asked_to_stop, memory_advice
from lab.evaluation import evaluate
from lab.fit_config import FitConfig
from lab.loaders import Loaders, seed_of
from lab.lora import merge
from lab.models import save_model
from lab.modes import train_mode
from lab.optim import Schedule
from lab.outcome import record
from lab.processes import processes
from lab.runs import Run
from lab.state import History, State, epoch_line

CHECK_EVERY = 50  # steps between looks at the loss; each look makes a GPU wait


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
    with memory_advice(advice), asked_to_stop() as stop:
        trainer.resume()
        while trainer.state.epoch <= config.epochs:
            trainer.train_epoch(stop)
            trainer.finish_epoch()
            if trainer.agreed(stop) and trainer.state.epoch <= config.epochs:
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
        processes()  # before Accelerate looks for them itself
        self.accelerator = Accelerator(mixed_precision=config.mixed_precision)
        device = self.accelerator.device
        loaders.to(device, self.accelerator.process_index, self.accelerator.num_processes)
        self.schedule = Schedule(
            steps := config.epochs * loaders.steps,
            int(config.warmup * steps),
            config.decay,
            config.lr_floor,
        )
        classes = len(loaders.data.classes)
        self.mixers: list[nn.Module] = []
        if config.mixup:
            self.mixers.append(v2.MixUp(alpha=config.mixup, num_classes=classes))
        if config.cutmix:
            self.mixers.append(v2.CutMix(alpha=config.cutmix, num_classes=classes))
        self.plain = model.to(device)  # what is saved; `model` may get wrapped for processes
        self.ema = None
        if config.ema_decay:
            self.ema = ModelEmaV3(model, decay=config.ema_decay, use_warmup=True)
        if config.compile:
            model.compile()
        if self.accelerator.num_processes > 1:
            self.model, self.optimizer = self.accelerator.prepare(model, optimizer)
        else:  # one process needs no wrapper around the optimizer, which costs as much
            self.model, self.optimizer = self.accelerator.prepare(model), optimizer
        self.state = State()
        self.board: Board | None = None

    @property
    def judged(self) -> nn.Module:
        """The model that is validated, kept and tested."""
        return self.ema.module if self.ema else self.plain

    def resume(self) -> None:
        """Takes up the state that the run's folder holds, if any."""
        kind = "bf16" if self.config.mixed_precision == "bf16" else "fp32"
        count = sum(p.numel() for p in self.plain.parameters())
        where = f"{self.accelerator.num_processes} x {self.accelerator.device.type}, {kind}"
        self.say(f"{self.loaders.data.describe()}\n{count:,} parameters on {where}")
        path = self.run.folder / "last.pt"
        if path.exists():
            saved = load_state(path)
            load_strictly(self.plain, saved["model"], path)
            self.optimizer.load_state_dict(saved["optimizer"])
            if self.ema:
                load_strictly(self.ema.module, saved["ema"], path)
            self.state = State(**saved["state"])
            at = f"epoch {self.state.epoch}, step {self.state.step + 1}"
            self.say(f"going on at {at} of {self.loaders.steps}: {self.run.folder}")
        if self.accelerator.is_main_process:
            self.run.write_history(self.state.history)
            if self.config.tensorboard:
                self.board = Board(self.run.folder, self.state.epoch)

    def save(self) -> None:
        if self.accelerator.is_main_process:
            saved = {
                "model": self.plain.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "ema": self.ema.module.state_dict() if self.ema else None,
                "state": asdict(self.state),
            }
            save_state(self.run.folder / "last.pt", saved)

    def agreed(self, stop: list[int]) -> bool:
        """Whether any process was told to stop: then all do, or some would wait for ever."""
        told = torch.tensor(float(bool(stop)), device=self.accelerator.device)
        return bool(self.accelerator.reduce(told) > 0)

    def leave(self, stop: list[int]) -> None:
        self.save()
        at = f"epoch {self.state.epoch}, step {self.state.step}"
        raise Stopped(stop[0] if stop else signal.SIGTERM, f"{at}: {self.run.folder}")

    def train_epoch(self, stop: list[int]) -> None:
        """The steps of the running epoch that are still to do."""
        state, config, device = self.state, self.config, self.accelerator.device
        totals = torch.tensor(state.totals, device=device)
        losses: list[Tensor] = []
        look = 1 if device.type == "cpu" else CHECK_EVERY
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
            if state.step % look == 0 or state.step == self.loaders.steps:
                self.check(losses)
                losses.clear()
            # Processes must leave together, so several of them stop between epochs only.
            if stop and self.accelerator.num_processes == 1 and state.step < self.loaders.steps:
                state.totals, state.seconds = totals.tolist(), time.perf_counter() - started
                bar.close()
                self.leave(stop)
        bar.close()
        state.totals = self.accelerator.reduce(totals).tolist()
        state.seconds = time.perf_counter() - started

    def step(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """One optimizer step: mean loss and number of right answers of this process's images."""
        state, config = self.state, self.config
        done = (state.epoch - 1) * self.loaders.steps + state.step
        # torch.manual_seed looks for devices of every kind, a quarter of a small head's step.
        seeded = torch.default_generator if images.device.type == "cpu" else torch
        seeded.manual_seed(seed_of(config.seed, state.epoch, state.step, self.loaders.rank))
        targets = labels
        if self.mixers and torch.rand(()) < config.mix_probability:
            images, targets = self.mixers[torch.randint(len(self.mixers), ())](images, labels)
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
        if self.ema:
            self.ema.update(self.plain, step=done)
        return loss, correct

    def check(self, losses: list[Tensor]) -> None:
        """Stops at the first loss that is not finite."""
        values = torch.stack(losses)
        if not values.isfinite().all():
            bad = int((~values.isfinite()).nonzero()[0])
            raise UserError(
                f"the loss became {values[bad].item()} in epoch {self.state.epoch}, step "
                f"{self.state.step - len(losses) + bad + 1}, at learning rate "
                f"{self.optimizer.param_groups[0]['lr']:.2g}. Lower LEARNING_RATE, or raise "
                "WARMUP, or set CLIP_GRAD to 1."
            )

    def finish_epoch(self) -> None:
        """Validates, writes the epoch's row, keeps the weights if they are the best so far."""
        state, (loss, correct, images) = self.state, self.state.totals
        scores = evaluate(self.judged, self.loaders, "val", self.accelerator)
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
        if self.accelerator.is_main_process:
            # In this order a kill between two lines is mended by the epoch that is run again.
            if better:
                path, loaders = self.run.folder / "best.safetensors", self.loaders
                save_model(path, self.judged, loaders.data.classes, loaders.preprocess, row)
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
        merge(self.plain)
        load_strictly(self.plain, load_weights(path)[0], path)
        scores = evaluate(self.plain, self.loaders, "test", self.accelerator)
        if self.accelerator.is_main_process:
            state = self.state
            record(self.run, scores, self.loaders.data, state.history, state.best_epoch)
            self.say(self.run.summary())

    def say(self, text: str) -> None:
        if self.accelerator.is_main_process and not self.config.trial:
            tqdm.write(text)
