r"""Search for good hyperparameters of a training script, and find out which ones matter.

    python sweep.py                          # train.py on mnist-5k: 20 trials, minutes each
    python sweep.py --sampler grid --space "PATCH_SIZE=4,7,14,28 EMBED_DIM=32,64"
    python sweep.py --script finetune.py --fixed="--dataset pets --mode full" \
        --space "LEARNING_RATE=log:1e-5..1e-3 LAYER_DECAY=0.6..1" --trials 40 --processes 2

Every trial is a run of the script with all its records. It is judged by its best validation
accuracy and is pruned when it falls behind. The same command resumes a stopped sweep; in a second
terminal, it joins a running one. Table, plots, records and runs go to results/sweep/<name>/.
"""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

from filelock import FileLock

from lab.core import Run, UserError, checkpoints, constants, runtime
from lab.sweep import Script, Sweep, SweepConfig, parse_space

# --- Search space ---
SCRIPT: str = "train.py"  # train.py, finetune.py, finetune_swin.py, cnn_baseline.py or your own
SPACE: str = "LEARNING_RATE=log:3e-4..1e-2 BATCH_SIZE=16,32,64,128"  # a,b,c; lo..hi; log:lo..hi
FIXED: str = ""  # flags of every trial, as in --fixed="--dataset cifar10 --epochs 30"

# --- Search ---
SAMPLER: Literal["grid", "random", "tpe"] = "random"  # tpe: samples near good trials
TRIALS: int | None = None  # at most 10,000; None: every point of a grid, otherwise 20
PROCESSES: int = 1  # trials to run in parallel; they share the CPU cores or the GPU

# --- Pruning: stop a trial that is below the median of the others at the same epoch ---
PRUNE: bool = True  # finetune.py --mode head takes seconds and is never pruned
PRUNE_AFTER_EPOCHS: int = 10  # epochs before pruning; early rankings mislead
PRUNE_AFTER_TRIALS: int = 5  # finished trials before any other is pruned

# --- Run ---
SEED: int = 0  # seed of the sampled points; each run has its own SEED
RESULTS_DIR: str = "results/sweep"  # contains one folder per sweep
NAME: str | None = None  # name of the sweep's folder; by default from dataset, script and space
OVERWRITE: bool = False  # start over, deleting the records and runs of the same sweep


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if runtime.process_state().num_processes > 1:
        raise UserError("sweep.py starts its own processes: run it with python")
    prune_after = (c.PRUNE_AFTER_EPOCHS, c.PRUNE_AFTER_TRIALS) if c.PRUNE else None
    config = SweepConfig(c.SAMPLER, c.SEED, c.TRIALS, c.PROCESSES, prune_after)
    script = Script.load(c.SCRIPT, c.FIXED)
    space = parse_space(c.SPACE, script, c.SAMPLER)

    names = ("SCRIPT", "SPACE", "FIXED", "SAMPLER", "SEED", "NAME")
    identity = {key: vars(c)[key] for key in names}
    model_file = Path(str(script.values.get("MODEL_FILE")))
    if model_file.is_file():  # trials of different models cannot be compared
        identity["MODEL_FILE"] = runtime.source_hash(model_file.read_bytes())
    dataset = Path(str(script.values.get("DATASET", "data"))).name
    name = c.NAME or "-".join([dataset, script.path.stem, *map(str.lower, space)])[:100]
    results_dir = Path(c.RESULTS_DIR)
    with checkpoints.explain_write_errors(results_dir):
        results_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(results_dir / ".lock"):  # two terminals may start at the same time
        metadata = {"dataset": {"fingerprint": None}}  # each trial has its own
        scripts = (script.path,)
        run = Run.open(
            results_dir, name, identity, metadata, c.OVERWRITE, shared=True, scripts=scripts
        )
        sweep = Sweep(run.folder, script, space, config)
    record = sweep.run()
    print(f"\n{record['says']}\n{sweep.folder / 'sweep.md'}")
    if record["best"] is not None:
        print(sweep.folder / "parallel.png")


if __name__ == "__main__":
    runtime.run_script(main)
