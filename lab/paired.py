"""Models on the same test images: which differ beyond chance, and which images are hardest."""

from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

from lab.configurations import Configuration, groups, is_reference, tested
from lab.records import Record
from lab.stats import holm, mcnemar

MOST = 6  # models compared on a set of images: 15 pairs, which Holm's correction can still carry
HARDEST = 24  # images shown


@dataclass(frozen=True)
class Pair:
    """Two runs on the same images; `p_holm` is corrected for all pairs of those images."""

    one: Record
    other: Record
    only_one: int  # images that the first alone has right
    only_other: int
    p: float
    p_holm: float

    @property
    def says(self) -> str:
        count = self.only_one + self.only_other
        if not count:
            return "They are right and wrong on the same images."
        better, worse = self.one, self.other
        if self.only_other > self.only_one:
            better, worse = worse, better
        if self.p_holm < 0.05:
            return (
                f"{better.model} is better than {worse.model}: of the {count} images that one "
                f"alone has right, {max(self.only_one, self.only_other)} are its own."
            )
        if self.p < 0.05:
            return "On its own this would hardly be chance; among so many comparisons it may be."
        return f"No difference that chance does not explain ({count} images tell them apart)."


def chosen(found: list[Configuration], place: Path) -> list[list[Record]]:
    """By set of test images, the runs to compare: at least two, at most MOST.

    Of each model the configuration that is best on validation images, trained on all training
    images, and of its seeds the first; of these the best on validation. The reader's own go before
    those of the project. Nothing is chosen by the test images that then judge.
    """

    def worth(c: Configuration) -> tuple[bool, tuple[float, float]]:
        return not is_reference(c.first, place), c.validation

    whole = [c for c in found if c.first.share == 1 and not c.first.sweep]
    result = []
    for same in groups(whole, lambda c: tested(c.first)):
        by_model = groups(same, lambda c: (c.first.task, c.first.model))
        best = sorted((max(configs, key=worth) for configs in by_model), key=worth, reverse=True)
        if len(best) > 1:
            result.append([c.first for c in best[:MOST]])
    return result


def pairs(runs: list[Record]) -> list[Pair]:
    """Every two of these runs, tested by McNemar's exact test with Holm's correction."""
    both = list(combinations(runs, 2))
    tests = [mcnemar(a.predictions.correct, b.predictions.correct) for a, b in both]
    adjusted = holm([p for *_, p in tests])
    return [
        Pair(a, b, *test, p_holm)
        for (a, b), test, p_holm in zip(both, tests, adjusted, strict=True)
    ]


def hardest(runs: list[Record]) -> list[dict[str, Any]]:
    """The images that most of these runs get wrong, and of equal ones the most confidently.

    Returns: for each, `index` into the predictions, and `wrong`, the number of runs.
    """
    wrong = np.stack([~run.predictions.correct for run in runs])  # (runs, N)
    sure = np.stack([run.predictions.confidence for run in runs])
    count = wrong.sum(0)
    order = np.lexsort((-(sure * wrong).sum(0), -count))[:HARDEST]
    return [{"index": int(i), "wrong": int(count[i])} for i in order if count[i]]
