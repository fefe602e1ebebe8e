"""A model's outputs on a whole split, in one process or several."""

import time
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

from lab.core import UserError, checkpoints, machine
from lab.data import Loaders, to_device
from lab.training.results import Predictions

SAVE_SECONDS = 60  # how often outputs are saved


@torch.no_grad()
def predict(
    model: nn.Module,
    loaders: Loaders,
    split: str,
    accelerator: Accelerator,
    view: int = 0,
    partial: Path | None = None,
) -> Tensor:
    """The model's output for each image of a split, (N, ...), in the split's order, on the CPU.

    A progress bar appears after two seconds.

    Args:
        model: maps images (B, C, H, W) to (B, ...); left in evaluation mode.
        loaders: the batches, on the accelerator's device.
        split: "train", "val" or "test".
        accelerator: processes and precision.
        view: 0 for the images as evaluation sees them; 1, 2, ... for fixed augmented views.
        partial: a file for the outputs and the seconds that they took, written once a minute, after
            Ctrl-C and at the end; the same call resumes from it. None: an interruption loses them.

    Raises: UserError, if there are fewer images than processes.
    """
    model.eval()
    size, world, outputs = len(getattr(loaders.data, split)), accelerator.num_processes, None
    done, started = 0, time.perf_counter()
    if size < world:
        raise UserError(
            f"the {split} split has only {size} images for {world} processes: start at most {size} "
            "processes"
        )
    bar = tqdm(
        desc=f"{split} images", total=len(range(accelerator.process_index, size, world)),
        delay=2, leave=False, disable=None if accelerator.is_main_process else True, unit=" images",
    )  # fmt: skip
    if partial and partial.exists():
        state, header = checkpoints.load_weights(partial)
        outputs, done = state["outputs"].to(accelerator.device), header["images"]
        started -= header["seconds"]
        bar.update(done)
        print(f"resuming after {done:,} of {size:,} {split} images", flush=True)

    saved_images, saved_at = done, time.perf_counter()

    def save() -> None:
        if partial and done > saved_images:
            header = {"images": done, "seconds": time.perf_counter() - started}
            checkpoints.save_weights(partial, {"outputs": outputs}, header)

    with bar:
        try:
            for index, images, _ in loaders.evaluation(split, view, done):
                with accelerator.autocast(), machine.allow_tf32(accelerator.device):
                    values = model(images).float()
                if outputs is None:
                    outputs = torch.zeros(size, *values.shape[1:], device=accelerator.device)
                outputs[to_device(index, outputs.device)] = values
                done += len(images)
                bar.update(len(images))
                if time.perf_counter() - saved_at > SAVE_SECONDS:
                    save()
                    saved_images, saved_at = done, time.perf_counter()
        finally:  # also after Ctrl-C
            save()
    return accelerator.reduce(outputs).cpu()  # a sum: each row is zero in all processes but one


def evaluate(
    model: nn.Module, loaders: Loaders, split: str, accelerator: Accelerator
) -> Predictions:
    """Logits and labels of each image of a split, exactly once, in the split's order."""
    logits = predict(model, loaders, split, accelerator)
    return Predictions(logits, getattr(loaders.data, split).labels)
