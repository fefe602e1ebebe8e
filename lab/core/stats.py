"""How sure a figure is: intervals, calibration, paired tests."""

import numpy as np
from scipy.stats import binomtest


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
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
    gaps = [abs(sure - right) * n for sure, right, n in reliability(confidence, correct, bins)]
    return float(sum(gaps) / len(confidence))


def reliability(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15
) -> list[tuple[float, float, int]]:
    """Mean confidence, share that is right, and images of every bin that is not empty."""
    edges = np.linspace(0, 1, bins + 1)
    index = np.digitize(confidence, edges[1:-1], right=True)
    return [
        (float(confidence[index == i].mean()), float(correct[index == i].mean()), int(n))
        for i, n in enumerate(np.bincount(index, minlength=bins))
        if n
    ]


def mcnemar(one: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """Do two models differ on the same images? The exact test (McNemar 1947), two-sided.

    Args:
        one, other: whether each model was right, (N,) bool.

    Returns: images that only the first has right, that only the other has, and the probability of
        so uneven a division, or a more uneven one, if each such image fell to either by chance.
    """
    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    p = binomtest(first, first + second, 0.5).pvalue if first + second else 1.0
    return first, second, float(p)


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): below 0.05, all such hold at 5 % together."""
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def mean_interval(values: np.ndarray) -> list[float]:
    """A mean over images (N,) with its 95 % bootstrap interval, [mean, low, high], for records."""
    return [round(float(x), 4) for x in (values.mean(), *bootstrap(values))]


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile interval of a mean over images (N,) (Efron 1979); the same every time."""
    rng = np.random.default_rng(0)
    means = [rng.choice(values, len(values)).mean() for _ in range(draws)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
