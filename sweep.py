r"""Try hyperparameters of a script, and find out which of them matter.

    python sweep.py                          # train.py on digits: 20 trials, a minute or less each
    python sweep.py --sampler grid --space "PATCH_SIZE=1,2,4,8 EMBED_DIM=32,64"
    python sweep.py --script finetune.py --fixed="--dataset pets --mode full" \
        --space "LEARNING_RATE=log:1e-5..1e-3 LAYER_DECAY=0.6..1" --trials 40 --processes 2

Every trial is a run of the script with all its records, judged by its best validation accuracy,
and stopped when it is hopeless. The same command goes on where a sweep was stopped, and in a second
terminal joins in. Table, plots, records and runs go to results/sweep/<name>/.
"""

import shlex
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

from lab.core import constants
from lab.core.errors import UserError, run_script
from lab.core.runs import NOT_IDENTITY
from lab.core.runtime import process_state
from lab.sweep_plots import draw_sweep
from lab.sweep_records import open_sweep, write_records
from lab.sweep_script import Script
from lab.sweep_space import Parameter, parse_space
from lab.sweep_trials import SweepConfig, Trials

# --- What is tried ---
SCRIPT: str = "train.py"  # train.py, finetune.py, finetune_swin.py, cnn_baseline.py or your own
SPACE: str = "LEARNING_RATE=log:3e-4..1e-2 BATCH_SIZE=16,32,64,128"  # a,b,c or low..high or log:
FIXED: str = ""  # flags of every run, as in --fixed="--dataset cifar10 --epochs 30"

# --- How ---
SAMPLER: Literal["grid", "random", "tpe"] = "random"  # tpe: near what was good; skews importance
TRIALS: int | None = None  # none: all of a grid, else 20
PROCESSES: int = 1  # trials at once; they share the cores, or the GPU

# --- Pruning: a trial below the median of the others at its epoch is stopped ---
PRUNE: bool = True  # not MODE=head of finetune.py, which takes seconds
PRUNE_AFTER_EPOCHS: int = 10  # epochs that every trial gets; early ones rank badly
PRUNE_AFTER_TRIALS: int = 5  # trials that finish before others are judged by them

# --- Run ---
SEED: int = 0  # of the points that are tried; the runs have their own
RESULTS_DIR: str = "results/sweep"  # one folder a sweep
NAME: str | None = None  # of the sweep's folder; none: from dataset, script and space
OVERWRITE: bool = False  # start over, deleting the same sweep with its runs


def main() -> None:
    c = SimpleNamespace(**constants.override(sys.modules[__name__]))
    if process_state().num_processes > 1:
        raise UserError("sweep.py starts processes of its own: run it with python")
    prune_after = (c.PRUNE_AFTER_EPOCHS, c.PRUNE_AFTER_TRIALS) if c.PRUNE else None
    how = SweepConfig(c.SAMPLER, c.SEED, c.TRIALS, c.PROCESSES, prune_after)
    script = Script.load(c.SCRIPT, c.FIXED)
    space = parse_space(c.SPACE, script, c.SAMPLER)
    folder = open_sweep(Path(c.RESULTS_DIR), c.NAME or name_of(script, space),
                        facts_of(c, script, space), c.OVERWRITE)  # fmt: skip
    trials = Trials(folder, script, space, how)
    write = partial(write_records, folder, trials.study, space, trials.asked)
    try:
        trials.work(write)
    finally:  # what there is, also of a sweep that was stopped
        with trials.lock:
            record = write()
            picture = draw_sweep(folder, record, space) if record["best"] is not None else ""
    print("\n".join(map(str, ["", record["says"], folder / "sweep.md", picture])).rstrip())


def facts_of(c: SimpleNamespace, script: Script, space: list[Parameter]) -> dict[str, Any]:
    """What was asked for; all of it but the number of trials tells a sweep from others."""
    swept = [p.name for p in space]
    kept = {k: v for k, v in script.values.items() if k not in (*swept, *NOT_IDENTITY)}
    constants = {
        "SCRIPT": script.path.as_posix(), "SPACE": " ".join(map(str, space)),
        "SAMPLER": c.SAMPLER, "SEED": c.SEED,
        **{f"{script.path.stem}.{k}": v for k, v in {**kept, **script.tables}.items()},
    }  # fmt: skip
    return {
        "script": c.SCRIPT, "space": c.SPACE, "fixed": c.FIXED, "sampler": c.SAMPLER,
        "seed": c.SEED, "command": shlex.join(["python", "sweep.py", *sys.argv[1:]]),
        "identity": {"constants": constants, "data": None},
    }  # fmt: skip


def name_of(script: Script, space: list[Parameter]) -> str:
    """A readable name: dataset, script, what is swept."""
    dataset = Path(str(script.values.get("DATASET", ""))).name
    words = [dataset, script.path.stem, *(p.name.lower() for p in space)]
    return "-".join(filter(None, words))[:100]


if __name__ == "__main__":
    run_script(main)
