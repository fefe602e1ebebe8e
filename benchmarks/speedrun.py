"""How fast can a plain ViT be trained? CIFAR-10 against the clock.

    python -m benchmarks.speedrun       # three runs each: a CPU: 10 minutes; a GPU: 60, 150, 360 s
    python -m benchmarks.speedrun --variants all --seconds 120      # each choice undone, in turn

A plain ViT: no convolution beyond the patch embedding, no distillation, no data but CIFAR-10's
training images, a tenth of which are set aside for validation. A run gets so many seconds, and its
learning rate falls to zero as they pass: the result is the accuracy that the time buys. The clock
starts with the first step (data loaded, kernels compiled) and stands still during looks at
validation images. The test images are used once, at the end. Finished runs are kept.
"""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from benchmarks.race import Runner
from benchmarks.speedrun_table import picture, table
from benchmarks.table import command
from lab.core import UserError, checkpoints, constants, run_script, runtime
from lab.data import Augmentation, Loaders, Preprocess, load_data

# A constant that is None takes its value from RECIPES, by device.

# --- The race ---
DATASET: str = "cifar10"  # cifar10, or a folder of images of 32 pixels
DATA_DIR: str = "data"  # where the download is
SECONDS: str | None = None  # how long a run may train; several: "60,150,360"
NUM_SEEDS: int = 3  # runs of each, from seed 0 on
VARIANTS: str = "chosen"  # of VARIANT below, or all
CHECKS: int = 10  # looks at some of the validation images in a run, the clock stopped
CLOCK: Literal["wall", "cpu"] = "wall"  # cpu: processor time, for a machine that is busy
# --- The model ---
PATCH_SIZE: int | None = None  # pixels
EMBED_DIM: int | None = None  # width
DEPTH: int | None = None  # blocks
NUM_HEADS: int | None = None  # attention heads
# --- The recipe ---
OPTIMIZER: Literal["muon", "adamw"] = "muon"  # Muon for the blocks' matrices
LEARNING_RATE: float | None = None  # peak rate
WEIGHT_DECAY: float = 0.05  # of weight matrices
BATCH_SIZE: int | None = None  # images a step
WARMUP_FRACTION: float = 0.05  # share of the time in which the rate rises
PROGRESSIVE_RESIZE: float = (
    0.6  # share of the time on images of half the size: a quarter of the tokens
)
WARM_START: bool = True  # the patch embedding starts as the principal components of patches
CROP_PADDING: int | None = None  # pixels, a random crop
CUTMIX_UNTIL: float | None = None  # share of the time with cutmix on half of the batches
LABEL_SMOOTHING: float = 0.1  # share of the target spread over all classes
EMA_DECAY: float = 0.0  # judge a moving average of the weights; 0: off
PRECISION: Literal["auto", "bf16", "fp32"] = "auto"  # auto: bf16 where it is in hardware
COMPILE: bool | None = None  # torch.compile, with CUDA graphs
# --- Output ---
OUT: str = "benchmarks/local/speedrun-{device}"  # folder of the records
OVERWRITE: bool = False  # run again what is finished
PROFILE: bool = False  # instead of racing, say where the time of a step goes

RECIPES = {
    "cpu": {  # two cores see some hundred thousand images in ten minutes: a small model
        "SECONDS": "600", "PATCH_SIZE": 4, "EMBED_DIM": 128, "DEPTH": 6, "NUM_HEADS": 4,
        "LEARNING_RATE": 3e-3, "BATCH_SIZE": 128, "CROP_PADDING": 0,
        "CUTMIX_UNTIL": 0.0, "COMPILE": False,
    },
    "cuda": {  # not run yet
        "SECONDS": "60,150,360", "PATCH_SIZE": 4, "EMBED_DIM": 384, "DEPTH": 8, "NUM_HEADS": 6,
        "LEARNING_RATE": 2e-3, "BATCH_SIZE": 1024, "CROP_PADDING": 2,
        "CUTMIX_UNTIL": 0.8, "COMPILE": True,
    },
}  # fmt: skip

VARIANT = {  # what a choice brings: the run with another one
    "chosen": {},
    "AdamW": {"OPTIMIZER": "adamw"},
    "AdamW at 1e-3": {"OPTIMIZER": "adamw", "LEARNING_RATE": 1e-3},
    "full size throughout": {"PROGRESSIVE_RESIZE": 0.0},
    "random embedding": {"WARM_START": False},
    "shift of 2 pixels": {"CROP_PADDING": 2},
    "no smoothing": {"LABEL_SMOOTHING": 0.0},
    "cutmix until 80 percent": {"CUTMIX_UNTIL": 0.8},
    "moving average": {"EMA_DECAY": 0.99},
    "usual": {  # what public small ViTs do
        "OPTIMIZER": "adamw", "LEARNING_RATE": 1e-3, "PROGRESSIVE_RESIZE": 0.0, "WARM_START": False,
        "CROP_PADDING": 4,
    },
}  # fmt: skip
NOT_THE_RUN = {"SECONDS", "NUM_SEEDS", "VARIANTS", "DATA_DIR", "OUT", "OVERWRITE", "PROFILE"}


def finished(path: Path, asked: dict[str, Any]) -> bool:
    """Whether a run's record is there already.

    Raises: UserError, if it is one of other constants.
    """
    if OVERWRITE or not path.exists():
        return False
    there = json.loads(path.read_text(encoding="utf-8"))
    changed = [name for name in asked if there["constants"].get(name) != asked[name]]
    if changed or there["constants"].keys() != asked.keys():
        raise UserError(
            f"{path} is a run with different constants ({', '.join(changed)}). Replace it with "
            "--overwrite, or choose another --out"
        )
    return True


def main() -> None:
    values = constants.override(sys.modules[__name__])
    device = runtime.process_state().device
    c = constants.resolve(values, RECIPES[device.type])
    names = list(VARIANT) if VARIANTS == "all" else VARIANTS.split(",")
    if unknown := [name for name in names if name not in VARIANT]:
        raise UserError(f"VARIANTS: {unknown[0]!r} is none of all, {', '.join(VARIANT)}")
    try:
        budgets = [float(word) for word in c.SECONDS.split(",")]
    except ValueError:
        raise UserError(f"SECONDS={c.SECONDS!r} must be numbers such as 60,150,360") from None
    data = load_data(DATASET, DATA_DIR)
    preprocess = Preprocess(data.train.store.shape[-1], data.mean, data.std, 1.0)
    folder = Path(OUT.format(device=device.type))
    folder.mkdir(parents=True, exist_ok=True)
    for budget, seed, name in itertools.product(budgets, range(NUM_SEEDS), names):
        own = SimpleNamespace(**{**vars(c), **VARIANT[name]})
        asked = {key: value for key, value in vars(own).items() if key not in NOT_THE_RUN}
        path = folder / f"{name.replace(' ', '-')}-{budget:g}s-{seed}.json"
        if not PROFILE and finished(path, asked):
            continue
        how = Augmentation(crop_padding=own.CROP_PADDING, flip=True)
        loaders = Loaders(data, preprocess, own.BATCH_SIZE, how)
        loaders.to(device)
        runner = Runner(own, loaders, seed)
        if PROFILE:
            return runner.profile(folder / "profile.txt")
        found = runner.run(budget)
        record = {"variant": name, "budget": budget, "seed": seed, **found, "data": data.name,
                  "constants": asked, **runtime.provenance(),
                  "command": command("speedrun")}  # fmt: skip
        checkpoints.write_json(path, record)
        print(f"{name}, {budget:g} s, seed {seed}: {found['test_accuracy']:.2%} of the test "
              f"images right after {found['images']:,} images", flush=True)  # fmt: skip
    print(table(folder))
    print("\n".join(str(path) for path in (*picture(folder), folder / "table.md")))


if __name__ == "__main__":
    run_script(main)
