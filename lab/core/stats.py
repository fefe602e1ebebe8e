"""Confidence intervals, calibration, and paired significance tests."""

import math
from statistics import NormalDist

import numpy as np


def wilson_interval(correct: int, total: int, confidence: float = 0.95) -> tuple[float, float]:
    """The confidence interval of a proportion, such as accuracy on `total` images (Wilson 1927).

    Returns: the lower and the upper bound, between 0 and 1.
    """
    share, z = correct / total, NormalDist().inv_cdf((1 + confidence) / 2)
    scale = 1 + z**2 / total
    center = (share + z**2 / (2 * total)) / scale
    half_width = z / scale * math.sqrt(share * (1 - share) / total + z**2 / (4 * total**2))
    return float(max(0, center - half_width)), float(min(1, center + half_width))


def calibration_error(confidence: np.ndarray, correct: np.ndarray, bins: int = 15) -> float:
    """Expected calibration error (Guo et al. 2017, eq. 3).

    Args:
        confidence: the probability of the predicted class, (N,).
        correct: whether the prediction was right, (N,).
        bins: bins of equal width, closed on the right.
    """
    gaps = [
        abs(mean - accuracy) * n for mean, accuracy, n in reliability(confidence, correct, bins)
    ]
    return float(sum(gaps) / len(confidence))


def reliability(
    confidence: np.ndarray, correct: np.ndarray, bins: int = 15
) -> list[tuple[float, float, int]]:
    """Mean confidence, accuracy, and number of images of each bin that is not empty.

    Args: as for `calibration_error`.
    """
    edges = np.linspace(0, 1, bins + 1)
    index = np.digitize(confidence, edges[1:-1], right=True)
    return [
        (float(confidence[index == i].mean()), float(correct[index == i].mean()), int(n))
        for i, n in enumerate(np.bincount(index, minlength=bins))
        if n
    ]


def mcnemar(one: np.ndarray, other: np.ndarray) -> tuple[int, int, float]:
    """Tests whether two models differ in accuracy: McNemar's exact two-sided test (1947).

    Args:
        one, other: whether each model classified each of the same images correctly, (N,) bool.

    Returns: the number of images that only the first model classified correctly, the number that
        only the other did, and the p-value.
    """
    first, second = int((one & ~other).sum()), int((other & ~one).sum())
    n = first + second  # under the null hypothesis, each of these is a fair coin toss
    tail = sum(math.comb(n, k) for k in range(min(first, second) + 1))
    return first, second, min(1.0, 2 * tail / 2**n)


def holm(p: list[float]) -> list[float]:
    """p-values adjusted for multiple comparisons (Holm 1979).

    Rejecting all hypotheses with an adjusted value below 0.05 keeps the probability of any false
    rejection below 5 %.
    """
    adjusted, least = [0.0] * len(p), 0.0
    for rank, i in enumerate(sorted(range(len(p)), key=p.__getitem__)):
        least = max(least, min(1.0, (len(p) - rank) * p[i]))
        adjusted[i] = least
    return adjusted


def mean_interval(values: np.ndarray) -> list[float]:
    """The mean over images (N,) and its 95 % bootstrap interval: [mean, low, high], 4 decimals."""
    return [round(float(x), 4) for x in (values.mean(), *bootstrap(values))]


def bootstrap(values: np.ndarray, draws: int = 2000) -> tuple[float, float]:
    """The 95 % percentile bootstrap interval of a mean over images (N,) (Efron 1979).

    The seed is fixed, so equal values give equal intervals.
    """
    means = np.random.default_rng(0).choice(values, (draws, len(values))).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
