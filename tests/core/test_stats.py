"""Intervals, calibration and paired tests against statsmodels, torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from sklearn.calibration import calibration_curve
from statsmodels.stats.contingency_tables import mcnemar as their_mcnemar
from statsmodels.stats.multitest import multipletests
from statsmodels.stats.proportion import proportion_confint
from torchmetrics.functional.classification import binary_calibration_error

from lab.core.stats import calibration_error, holm, mcnemar, reliability, wilson_interval

RNG = np.random.default_rng()  # other cases every time; a failure prints its own


@pytest.mark.parametrize("_", range(20))
def test_mcnemar_equals_statsmodels(_):
    n = RNG.integers(1, 400)
    one, other = RNG.random(n) < RNG.random(), RNG.random(n) < RNG.random()
    table = [
        [(one & other).sum(), (one & ~other).sum()],
        [(~one & other).sum(), (~one & ~other).sum()],
    ]
    first, second, p = mcnemar(one, other)
    assert (first, second) == (table[0][1], table[1][0])
    assert p == pytest.approx(their_mcnemar(table, exact=True).pvalue, rel=1e-9), (first, second)


def test_models_with_the_same_mistakes_do_not_differ():
    right = RNG.random(50) < 0.7
    assert mcnemar(right, right) == (0, 0, 1.0)


@pytest.mark.parametrize("_", range(20))
def test_holm_equals_statsmodels(_):
    p = np.round(RNG.random(RNG.integers(1, 30)) ** 3, 2)  # rounded: equal ones happen
    assert holm(p.tolist()) == pytest.approx(multipletests(p, method="holm")[1].tolist()), p


def test_holm_of_none_is_none():
    assert holm([]) == []


@pytest.mark.parametrize("_", range(10))
def test_wilson_equals_statsmodels(_):
    n = int(RNG.integers(1, 10_000))
    k = int(RNG.integers(0, n + 1))
    theirs = proportion_confint(k, n, alpha=0.05, method="wilson")
    assert wilson_interval(k, n) == pytest.approx(theirs, abs=1e-9), (k, n)


@pytest.mark.parametrize("_", range(10))
def test_calibration_equals_torchmetrics_and_scikit_learn(_):
    n = int(RNG.integers(5, 500))
    confidence = RNG.random(n)
    correct = RNG.random(n) < confidence**2
    theirs = binary_calibration_error(torch.from_numpy(confidence), torch.from_numpy(correct), 15)
    assert calibration_error(confidence, correct) == pytest.approx(theirs.item(), abs=1e-6)
    share, sure = calibration_curve(correct, confidence, n_bins=15)
    bins = reliability(confidence, correct)
    assert [b[0] for b in bins] == pytest.approx(sure.tolist())
    assert [b[1] for b in bins] == pytest.approx(share.tolist())
    assert sum(b[2] for b in bins) == n


def test_bins_of_confidence_are_closed_on_the_right():
    """As Guo et al. define them: 0.5 belongs to (0, 0.5], not to (0.5, 1]."""
    found = reliability(np.array([0.5, 0.5, 0.75]), np.array([True, False, True]), bins=2)
    assert found == [(0.5, 0.5, 2), (0.75, 1.0, 1)]
