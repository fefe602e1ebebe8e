"""Trains a model, evaluates it, and writes the results of a run.

Open `loop.py` first: `train_one_epoch` is the training loop, and `fit` calls it. `optimizers.py`
has the optimizers and the learning-rate schedule.
"""

from lab.training.config import FitConfig
from lab.training.evaluation import evaluate, predict
from lab.training.loop import fit
from lab.training.results import Predictions

__all__ = [
    "FitConfig",
    "Predictions",
    "evaluate",
    "fit",
    "loop",
    "optimizers",
    "predict",
    "results",
]
