"""Runs put together: over seeds, by how much was trained, by share of the training images.

Models on the same test images: which differ beyond chance, and which images are hardest.
"""

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from lab.core import Run, stats
from lab.report.records import Record

# Constants that say how much of the weights is trained, and what follows from that.
HOW_MUCH = ("MODE", "TOP_K", "LAYER_DECAY", "LORA_RANK", "AUGMENT_VIEWS", "LEARNING_RATE", "RATES",
            "WEIGHT_DECAY", "WEIGHT_DECAYS")  # fmt: skip
NOT_COMPARED = ("SEED", "VIT", "MATCH", "EPOCHS")  # of a CNN twin and its ViT
SAME_TIME = 0.15  # training times that far apart count as equal
T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """Finished runs that differ in their seed alone, at least one, in the order of seeds."""

    runs: list[Record]

    @property
    def first(self) -> Record:
        return self.runs[0]

    @property
    def name(self) -> str:
        """The first run's folder without its seed."""
        seed = self.first.constants.get("SEED")
        return self.first.folder.name.removesuffix(f"-s{seed}")

    @property
    def accuracies(self) -> list[float]:
        return [run.metrics["test_accuracy"] for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def deviation(self) -> float | None:
        """Standard deviation over seeds; None for one seed."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def around(self) -> tuple[float, float]:
        """The 95 % interval of one run; mean minus and plus deviation of several."""
        if self.deviation is None:
            low, high = self.first.metrics["test_accuracy_95"]
            return low, high
        return max(0.0, self.mean - self.deviation), min(1.0, self.mean + self.deviation)

    @property
    def seconds(self) -> float:
        """Of training; the mean over seeds."""
        return statistics.mean(run.metrics["training_seconds"] for run in self.runs)

    @property
    def validation(self) -> tuple[float, float]:
        """How good it is on validation images: accuracy, and of equal ones the smaller loss."""
        best = [row for run in self.runs for row in run.history
                if row["epoch"] == run.metrics["best_epoch"]]  # fmt: skip
        accuracies = [run.metrics["val_accuracy"] for run in self.runs]
        return statistics.mean(accuracies), -statistics.mean(r["val_loss"] for r in best)


def groups(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """Items with the same key together, in the order in which keys first appear."""
    found: dict[object, list[T]] = defaultdict(list)
    for item in items:
        found[key(item)].append(item)
    return list(found.values())


def is_reference(run: Record | Run, place: Path) -> bool:
    """Whether a run comes with the project, in `official/` of the results."""
    return run.folder.relative_to(place).parts[0] == "official"


def configurations(runs: Iterable[Record], place: Path) -> list[Configuration]:
    """Finished runs by configuration; the reader's own apart from those of the project."""
    finished = [run for run in runs if run.metrics]
    found = []
    for same in groups(finished, lambda r: (setting(r, place), r.key("SEED"))):
        by_seed = {run.constants.get("SEED"): run for run in reversed(same)}  # the first one counts
        found.append(Configuration([by_seed[seed] for seed in sorted(by_seed, key=str)]))
    return found


def tested(run: Record) -> str:
    """The fingerprint of the test images."""
    return run.predictions.test_set


def setting(run: Record, place: Path) -> tuple[bool, str]:
    """What two runs share that may be compared: whose they are, and the test images."""
    return is_reference(run, place), tested(run)


def twins(
    found: list[Configuration], place: Path
) -> list[tuple[str, Configuration, Configuration]]:
    """ViTs from scratch and their CNN twins, trained in the same way on the same images.

    Returns: what was equal, "epochs" or "seconds" (within SAME_TIME), the ViT, the CNN.
    """
    pairs = []
    for cnn in (c for c in found if "twin_of" in c.first.config and c.first.share == 1):
        same = {k: v for k, v in cnn.first.constants.items() if k not in NOT_COMPARED}
        for vit in (c for c in found if c.first.script == "train.py" and c.first.share == 1):
            theirs = vit.first.constants
            if any(theirs.get(k) != v for k, v in same.items()):
                continue
            if setting(vit.first, place) != setting(cnn.first, place):
                continue
            if vit.first.constants["EPOCHS"] == cnn.first.constants["EPOCHS"]:
                pairs.append(("epochs", vit, cnn))
            elif abs(cnn.seconds / vit.seconds - 1) <= SAME_TIME:
                pairs.append(("seconds", vit, cnn))
    return pairs


def finetunings(found: list[Configuration], place: Path) -> list[list[Configuration]]:
    """The same weights on the same images with more or less of them trained."""
    tuned = [c for c in found if "PRETRAINED" in c.first.constants and c.first.share == 1]

    def key(c: Configuration) -> object:
        return setting(c.first, place), c.first.key("SEED", *HOW_MUCH)

    return [
        sorted(group, key=lambda c: c.first.config["model"]["trainable_parameters"])
        for group in groups(tuned, key)
        if len(group) > 1
    ]


def efficiencies(found: list[Configuration], place: Path) -> list[list[list[Configuration]]]:
    """By set of test images: configurations that saw several shares of the training images.

    Returns: test sets, of series, of configurations by growing share.
    """

    def key(c: Configuration) -> object:
        return setting(c.first, place), c.first.key("SEED", "TRAIN_FRACTION")

    series = [
        sorted(group, key=lambda c: c.first.share) for group in groups(found, key) if len(group) > 1
    ]
    return groups(series, lambda line: setting(line[0].first, place))


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
    tests = [stats.mcnemar(a.predictions.correct, b.predictions.correct) for a, b in both]
    adjusted = stats.holm([p for *_, p in tests])
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
