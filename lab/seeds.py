"""The same run from several seeds: how much of a result is luck?"""

import statistics
from collections.abc import Callable
from typing import Any

from lab.errors import UserError
from lab.processes import processes
from lab.runs import Run


def over_seeds(values: dict[str, Any], run_one: Callable[[dict[str, Any]], Run]) -> None:
    """Makes SEEDS runs, from SEED on, and says what came out over all of them.

    Each is the run that its seed alone would give, in a folder of its own, so an interrupted series
    goes on where it stopped.

    Args:
        values: a script's constants.
        run_one: makes the run of such constants.

    Raises: UserError, for less than one seed.
    """
    count, first, name = values["SEEDS"], values["SEED"], values["NAME"]
    if count < 1:
        raise UserError(f"SEEDS={count} must be at least 1, such as 5")
    if count == 1:
        run_one(values)
        return
    runs = []
    for seed in range(first, first + count):
        if processes().is_main_process:
            print(f"\n--- seed {seed} ---", flush=True)
        own = name and f"{name}-s{seed}"
        runs.append(run_one({**values, "SEED": seed, "NAME": own}))
    if processes().is_main_process:
        print(f"\n{spread([run.metrics()['test_accuracy'] for run in runs])}")


def spread(accuracies: list[float]) -> str:
    """Mean and standard deviation of test accuracies (shares of 1) over seeds, in words."""
    percent = [100 * accuracy for accuracy in accuracies]
    single = ", ".join(f"{value:.2f}" for value in percent)
    return (
        f"test accuracy over {len(percent)} seeds: mean {statistics.mean(percent):.2f} %, standard "
        f"deviation {statistics.stdev(percent):.2f} points ({single})"
    )
