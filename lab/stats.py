"""How sure a figure is: intervals and calibration."""

import numpy as np
from scipy.stats import binomtest


def wilson(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The interval of a share, such as accuracy on `total` test images (Wilson 1927)."""
    interval = binomtest(int(correct), int(total)).proportion_ci(confidence, method="wilson")
    return float(interval.low), float(interval.high)


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3).

    Args:
        confidence: the probability of the predicted class, (N,).
        correct: whether the prediction was right, (N,).
        bins: bins of equal width, closed on the right.
    """
    edges = np.linspace(0, 1, bins + 1)
    index = np.digitize(confidence, edges[1:-1], right=True)
    gap = np.bincount(index, weights=correct - confidence, minlength=bins)
    return float(np.abs(gap).sum() / len(confidence))


def mean_interval(values: np.ndarray) -> list[float]:
    """A mean over images (N,) with its 95 % bootstrap interval, [mean, low, high], for records."""
    return [round(float(x), 4) for x in (values.mean(), *bootstrap(values))]


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over images (N,) (Efron 1979); the same every time."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
