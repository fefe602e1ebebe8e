"""How accurate is a plain ViT after a fixed training time? CIFAR-10 against the clock.

    python -m benchmarks.speedrun       # three seeds; CPU: 10 minutes each; GPU: 60, 150 and 360 s
    python -m benchmarks.speedrun --variants all --seconds 120      # the effect of each choice

A plain ViT has no convolution besides the patch embedding, no distillation, and no data besides
CIFAR-10's training images, a tenth of which are used for validation. The learning rate falls to
zero as the time passes. The clock starts at the first step, after data loading and compilation, and
stops during validation. The test images are used once, at the end. Finished runs are kept.
"""

import itertools
import sys
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev
from types import SimpleNamespace
from typing import Any, Literal

from benchmarks import table
from benchmarks.race import Runner
from lab.core import UserError, checkpoints, constants, machine, plots, runtime
from lab.data import Augmentation, Loaders, Preprocess, load_data

# A constant that is None takes its value from RECIPES, by device.

# --- The race ---
DATASET: str = "cifar10"  # cifar10, or a folder of images of 32 pixels
DATA_DIR: str = "data"  # folder for downloads
SECONDS: str | None = None  # training time; several: "60,150,360"
NUM_SEEDS: int = 3  # runs of each, from seed 0
VARIANTS: str = "chosen"  # names in VARIANT_CHANGES, separated by commas, or all
CHECKS: int = 10  # validations during a run
CLOCK: Literal["wall", "cpu"] = "wall"  # cpu: processor time, for a busy machine
# --- The model ---
PATCH_SIZE: int | None = None  # pixels
EMBED_DIM: int | None = None  # width
DEPTH: int | None = None  # blocks
NUM_HEADS: int | None = None  # attention heads
MLP: Literal["gelu", "relu2", "swiglu"] = "gelu"  # relu2: squared ReLU; all of the same size
QK_NORM: bool = False  # layer norm of queries and keys
REG_TOKENS: int = 0  # register tokens: further tokens that belong to no patch
# --- The recipe ---
OPTIMIZER: Literal["muon", "adamw"] = "muon"  # Muon for the blocks' matrices
LEARNING_RATE: float | None = None  # peak learning rate
WEIGHT_DECAY: float = 0.05  # of weight matrices
BATCH_SIZE: int | None = None  # images per step
WARMUP_FRACTION: float = 0.05  # fraction of the time in which the learning rate rises
PROGRESSIVE_RESIZE: float = 0.6  # fraction of the time, first, on half-size images; 0: off
PATCH_DROP_RATE: float = 0.0  # fraction of the patches that training images lose at first
LAYER_DROP_RATE: float = 0.0  # probability with which a batch skips a block at first
DROP_UNTIL: float = 0.6  # fraction of the time, first, with patch and layer dropping
WARM_START: bool = True  # initialize the patch embedding with principal components
CROP_PADDING: int | None = None  # random crop after padding each side by this many pixels
CUTMIX_UNTIL: float | None = None  # fraction of the time with cutmix on half of the batches
LABEL_SMOOTHING: float = 0.1  # fraction of the target spread over all classes
EMA_DECAY: float = 0.0  # evaluate a moving average of the weights; 0: off
PRECISION: Literal["auto", "bf16", "fp16", "fp32"] = "auto"  # auto: the fastest in hardware
COMPILE: bool | None = None  # torch.compile, with CUDA graphs
# --- Output ---
OUT: str = "benchmarks/local/speedrun-{device}"  # folder of the records
OVERWRITE: bool = False  # repeat finished runs
PROFILE: bool = False  # instead of training, write the time of each operation

RECIPES = {
    "cpu": {  # two cores see a few hundred thousand images in ten minutes: a small model
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

CHOSEN = "chosen"  # the recipe as above
VARIANT_CHANGES = {  # the recipe with one choice changed
    CHOSEN: {},
    "AdamW": {"OPTIMIZER": "adamw"},
    "AdamW at 1e-3": {"OPTIMIZER": "adamw", "LEARNING_RATE": 1e-3},
    "full size throughout": {"PROGRESSIVE_RESIZE": 0.0},
    "random embedding": {"WARM_START": False},
    "crop padding 2": {"CROP_PADDING": 2},
    "no label smoothing": {"LABEL_SMOOTHING": 0.0},
    "cutmix until 80 percent": {"CUTMIX_UNTIL": 0.8},
    "EMA": {"EMA_DECAY": 0.99},
    "batch size 256": {"BATCH_SIZE": 256, "LEARNING_RATE": 4.2e-3},  # twice that of a CPU
    "patch dropout": {"PATCH_DROP_RATE": 0.25},
    "patch dropout at full size": {"PATCH_DROP_RATE": 0.75, "PROGRESSIVE_RESIZE": 0.0},
    "layer dropping": {"LAYER_DROP_RATE": 0.25, "COMPILE": False},
    "register tokens": {"REG_TOKENS": 4},
    "QK-norm": {"QK_NORM": True},
    "squared ReLU": {"MLP": "relu2"},
    "SwiGLU": {"MLP": "swiglu"},
    "common recipe": {  # that of most public small ViTs
        "OPTIMIZER": "adamw", "LEARNING_RATE": 1e-3, "PROGRESSIVE_RESIZE": 0.0, "WARM_START": False,
        "CROP_PADDING": 4,
    },
}  # fmt: skip
NOT_OF_THE_RUN = {
    "SECONDS", "NUM_SEEDS", "VARIANTS", "DATA_DIR", "OUT", "OVERWRITE", "PROFILE"
}  # fmt: skip
TARGETS = (0.90, 0.93, 0.95)  # validation accuracies, and the time to each
Records = list[dict[str, Any]]


def is_finished(path: Path, requested: dict[str, Any], code: dict[str, str]) -> bool:
    """Whether this code has a record of a run on this card.

    Raises: UserError, if the record has other constants.
    """
    if OVERWRITE or not path.exists():
        return False
    record = checkpoints.read_json(path)
    recorded = record["constants"]
    if recorded != requested:
        names = sorted(n for n, v in requested.items() if recorded.get(n) != v) or ["removed ones"]
        raise UserError(
            f"{path} is a run with different constants ({', '.join(names)}). Replace it with "
            "--overwrite, or choose another --out"
        )
    card = record["hardware"].get("gpu")
    return record.get("code") == code and card == machine.hardware().get("gpu")


def read(folder: Path) -> dict[tuple[float, str], dict[str, Records]]:
    """The records by (budget in seconds, machine and clock), then by variant, `chosen` first."""
    groups: dict = defaultdict(lambda: defaultdict(list))
    records = [checkpoints.read_json(path) for path in sorted(folder.glob("*.json"))]
    for record in sorted(records, key=lambda r: (r["budget"], r["variant"] != CHOSEN)):
        hardware = record["hardware"]
        where = hardware.get("gpu") or f"{hardware['cpu']}, threads: {hardware['threads']}"
        clock = {"wall": "wall clock", "cpu": "processor time"}[record["constants"]["CLOCK"]]
        groups[record["budget"], f"{where}, {clock}"][record["variant"]].append(record)
    return groups


def write_table(folder: Path) -> str:
    """The runs of a folder in Markdown, which is also written to table.md."""
    lines = []
    for (budget, where), variants in read(folder).items():
        first = next(iter(variants.values()))[0]
        versions = ", ".join(f"{name} {first['versions'][name]}" for name in ("torch", "timm"))
        chosen = {r["seed"]: r["test_accuracy"] for r in variants.get(CHOSEN, [])}
        cells = []
        for name, records in variants.items():
            pairs = [r["test_accuracy"] - chosen[r["seed"]] for r in records if r["seed"] in chosen]
            cells.append([
                name, str(len(records)), f"{records[0]['parameters']:,}",
                f"{mean(r['images'] for r in records):,.0f}",
                _percent([r["test_accuracy"] for r in records]),
                _percent(pairs, "+") if pairs and name != CHOSEN else "",
                *(_seconds_to(records, target) for target in TARGETS),
            ])  # fmt: skip
        commands = dict.fromkeys(r["command"] for records in variants.values() for r in records)
        heads = ["recipe", "seeds", "parameters", "images", "test accuracy (%)",
                 "difference (points)", *(f"s to {t:.0%}" for t in TARGETS)]  # fmt: skip
        lines += [
            f"{budget:g} seconds of training on {first['data']}; {where}; {versions}.", "",
            *table.to_markdown(heads, cells), "", *(f"`{command}`  " for command in commands), "",
        ]  # fmt: skip
    text = "\n".join(lines)
    (folder / "table.md").write_text(text, encoding="utf-8")
    return text


def _percent(values: list[float], sign: str = "") -> str:
    """Mean and, for two or more values, standard deviation, in percent."""
    text = f"{100 * mean(values):{sign}.2f}"
    return text + (f" ± {100 * stdev(values):.2f}" if len(values) > 1 else "")


def _seconds_to(records: Records, target: float) -> str:
    """Seconds until the validation accuracy reached a target, if it did for every seed."""
    times = [next((at for at, acc in r["curve"] if acc >= target), None) for r in records]
    if None in times:
        return "-"
    return f"{mean(times):.0f}" + (f" ± {stdev(times):.0f}" if len(times) > 1 else "")


def plot(folder: Path) -> list[Path]:
    """Validation accuracy against training time: one figure per budget, one color per recipe."""
    paths = []
    for (budget, where), variants in read(folder).items():
        figure, axis = plots.plt.subplots(figsize=(9.5, 5), layout="constrained")
        for number, (name, records) in enumerate(variants.items()):
            for record in records:
                seconds, accuracy = zip(*record["curve"], strict=True)
                axis.plot(
                    seconds, [100 * a for a in accuracy], marker="o", ms=3,
                    color=f"C{number % 10}", lw=2.4 if name == CHOSEN else 1.2,
                    label=name if record is records[0] else None,
                )  # fmt: skip
        axis.set(xlabel="seconds of training", ylabel="validation accuracy (%)", xlim=(0, None))
        axis.set_title(f"{budget:g} s on {where}", fontsize=10)
        axis.grid(alpha=0.25)
        axis.legend(fontsize=9, loc="center left", bbox_to_anchor=(1, 0.5))
        clock = "-processor-time" if "processor" in where else ""
        paths.append(folder / f"curves-{budget:g}s{clock}.png")
        plots.save_figure(figure, paths[-1])
    return paths


def main() -> None:
    values = constants.override(sys.modules[__name__])
    device = runtime.process_state().device
    if device.type not in RECIPES:
        raise UserError(f"this benchmark runs on {' and '.join(RECIPES)}, but not on {device.type}")
    c = constants.resolve(values, RECIPES[device.type])
    if values["COMPILE"] is None and c.COMPILE and not machine.can_compile(device):
        c.COMPILE = False
        print(
            "torch.compile needs Triton, a C compiler, Python.h and compute capability 7.0: "
            "running without it"
        )
    names = list(VARIANT_CHANGES) if VARIANTS == "all" else VARIANTS.split(",")
    if unknown := [name for name in names if name not in VARIANT_CHANGES]:
        raise UserError(f"VARIANTS: {unknown[0]!r} is none of all, {', '.join(VARIANT_CHANGES)}")
    try:
        budgets = [float(word) for word in c.SECONDS.split(",")]
    except ValueError:
        raise UserError(f"SECONDS={c.SECONDS!r} must be numbers such as 60,150,360") from None
    data = load_data(DATASET, DATA_DIR)
    preprocess = Preprocess(data.train.store.shape[-1], data.mean, data.std, 1.0)
    folder = Path(OUT.format(device=device.type))
    folder.mkdir(parents=True, exist_ok=True)
    code = runtime.code_hashes()
    for budget, seed, name in itertools.product(budgets, range(NUM_SEEDS), names):
        own = SimpleNamespace(**{**vars(c), **VARIANT_CHANGES[name]})
        requested = {key: value for key, value in vars(own).items() if key not in NOT_OF_THE_RUN}
        path = folder / f"{name.replace(' ', '-')}-{budget:g}s-{seed}.json"
        if not PROFILE and is_finished(path, requested, code):
            continue
        augmentation = Augmentation(crop_padding=own.CROP_PADDING, flip=True)
        loaders = Loaders(data, preprocess, own.BATCH_SIZE, augmentation)
        loaders.to(device)
        runner = Runner(own, loaders, seed)
        if PROFILE:
            runner.profile(folder / "profile.txt")
            return
        found = runner.run(budget)
        record = {"variant": name, "budget": budget, "seed": seed, **found, "data": data.name,
                  "constants": requested, "code": code, **table.provenance()}  # fmt: skip
        checkpoints.write_json(path, record)
        print(f"{name}, {budget:g} s, seed {seed}: test accuracy {found['test_accuracy']:.2%} "
              f"after {found['images']:,} images", flush=True)  # fmt: skip
    print(write_table(folder))
    print("\n".join(str(path) for path in (*plot(folder), folder / "table.md")))


if __name__ == "__main__":
    runtime.run_script(main)
