"""How a model is trained. This is the project's only training loop.

`train_one_epoch` contains every line that changes a weight. `fit` calls it once per epoch,
validates, and finally tests the weights of the best epoch. The other parts are in these modules:

    optimizers.py  AdamW, Muon and the learning-rate schedule
    trainer.py     setup, the batches of an epoch, saving and resuming
    mixing.py      mixup and cutmix
    state.py       how far a run is, and the moving average of its weights
    progress.py    running averages, progress bar, check for a non-finite loss
    snapshots.py   copies of the weights, to replay training in attention.html
    evaluation.py  predictions on the validation and test splits
"""

import torch
import torch.nn.functional as F
from torch import nn

from lab.core import Run, runtime
from lab.data import Loaders
from lab.training.config import FitConfig
from lab.training.evaluation import evaluate
from lab.training.progress import Progress
from lab.training.results import write_results
from lab.training.state import History
from lab.training.trainer import Trainer, memory_advice


def fit(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loaders: Loaders,
    config: FitConfig,
    run: Run,
) -> History:
    """Trains a model, validates it after every epoch, and tests the best epoch once.

    Args:
        model: maps images (B, C, H, W) to logits (B, classes); on the CPU.
        optimizer: optimizes the model's parameters; each group's `lr` is its peak learning rate.
        loaders: the batches of the dataset.
        config: how to train.
        run: the folder for records and checkpoints. An interrupted run resumes from it.

    Returns: the rows of history.csv.
    Raises: UserError, for example if the loss becomes NaN; Stopped after Ctrl-C or SIGTERM.
    """
    if run.finished:
        run.say_finished()
        return run.history()
    with runtime.explain_out_of_memory(memory_advice(config, loaders)):
        trainer = Trainer(model, optimizer, loaders, config, run)
        with runtime.handle_signals() as trainer.signals:
            trainer.resume()
            while trainer.state.epoch <= config.epochs:
                train_one_epoch(trainer)
                trainer.sync_buffers()
                val = evaluate(trainer.eval_model, loaders, "val", trainer.accelerator)
                trainer.finish_epoch(val)  # writes history.csv and, once a minute, the weights
            if not config.trial:
                trainer.load_best_weights()
                test = evaluate(trainer.model, loaders, "test", trainer.accelerator)
                if trainer.accelerator.is_main_process:
                    state = trainer.state
                    write_results(run, test, loaders.data, state.history, state.best_epoch)
                    trainer.log(run.summary())
            trainer.stop_after_the_run()
    return trainer.state.history


def train_one_epoch(trainer: Trainer) -> None:
    """Trains on each image of the training split once; after a resume, on the remaining ones.

    Args:
        trainer: the optimizer, the data, the state and the model. Its `train_model` is `model`,
            wrapped if several processes train together.

    Raises: UserError, if the loss is not finite; Stopped after Ctrl-C or SIGTERM.
    """
    model, optimizer, accelerator = trainer.train_model, trainer.optimizer, trainer.accelerator
    config, state = trainer.config, trainer.state
    progress = Progress(trainer)
    train_mode(model)
    for images, targets in trainer.batches():  # (B, C, H, W); (B,) classes or (B, classes) mixed
        trainer.schedule.set_lr(optimizer, trainer.global_step)
        optimizer.zero_grad()

        # With ACCUMULATION_STEPS above 1, a batch is split to save memory; the gradients add up.
        for x, y, fraction in trainer.split_batch(images, targets):
            with accelerator.autocast():  # bf16 or fp16 where the hardware is faster with it
                logits = model(x)  # (B, classes)
                loss = F.cross_entropy(logits, y, label_smoothing=config.label_smoothing)
                loss = loss * fraction  # the part's share, so that the sum is the batch's mean
            accelerator.backward(loss)
            progress.add(loss, logits, y)

        if config.clip_grad:
            accelerator.unscale_gradients()  # of fp16
            nn.utils.clip_grad_norm_(model.parameters(), config.clip_grad)
        optimizer.step()
        if trainer.ema:
            trainer.ema.update(trainer.model, trainer.global_step)

        state.step += 1
        if progress.finish_step():  # True after Ctrl-C
            break
    progress.close()
    if state.step < trainer.loaders.steps:
        trainer.save_and_exit()  # after Ctrl-C


def train_mode(model: nn.Module) -> None:
    """Puts a model in training mode, except for modules whose parameters are all frozen.

    Frozen modules stay in evaluation mode: no dropout, and batch norm keeps its statistics.
    """
    model.train()
    for module in model.modules():
        parameters = list(module.parameters())
        if parameters and not any(p.requires_grad for p in parameters):
            module.eval()
