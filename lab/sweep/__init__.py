"""Hyperparameter search over any training script, on Optuna.

Every trial is a normal run of the script in its own process, and is judged by its best validation
accuracy. Open `trials.py` first: it runs the trials. `search_space.py` reads the script's constants
and SPACE, `summary.py` turns the results into a paragraph, a table and plots.
"""

import warnings

from optuna.exceptions import ExperimentalWarning

from lab.sweep.search_space import Script, parse_space
from lab.sweep.trials import Sweep, SweepConfig

__all__ = ["Script", "Sweep", "SweepConfig", "parse_space"]

warnings.filterwarnings("ignore", "BruteForceSampler", ExperimentalWarning)
