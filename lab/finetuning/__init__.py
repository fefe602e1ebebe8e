"""Fine-tuning: what each mode trains, a linear probe on cached features, all modes compared.

Open `modes.py` first: it freezes what a mode does not train and chooses the learning rate.
"""

from lab.finetuning.comparison import compare_modes
from lab.finetuning.linear_probe import cached_features, train_linear_probe
from lab.finetuning.modes import (
    default_learning_rate,
    learning_rate_warning,
    mode_label,
    set_trainable,
    variant_of,
)

__all__ = [
    "cached_features",
    "compare_modes",
    "default_learning_rate",
    "learning_rate_warning",
    "mode_label",
    "set_trainable",
    "train_linear_probe",
    "variant_of",
]
