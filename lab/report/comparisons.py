"""Groups runs into configurations, and compares models on the same test images.

A configuration is a set of runs that differ only in their seed. Configurations are grouped by
fraction of the training images, by what was fine-tuned, and into pairs of a ViT and its CNN twin.
"""

import statistics
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any, TypeVar

import numpy as np

from lab.core import stats
from lab.report.records import Record

_MODE_CONSTANTS = ("MODE", "TOP_K", "LAYER_DECAY", "LORA_RANK")  # which weights are trained
_TUNED_CONSTANTS = ("AUGMENT_VIEWS", "LEARNING_RATE", "RATES", "WEIGHT_DECAY", "WEIGHT_DECAYS")
_NOT_SHARED_BY_TWINS = ("SEED", "VIT", "MATCH", "EPOCHS", "MODEL_FILE")
_SIZES = ("PATCH_SIZE", "EMBED_DIM", "DEPTH", "NUM_HEADS", "MLP_RATIO", "GLOBAL_POOL", "DROP_RATE",
          "DROP_PATH_RATE")  # fmt: skip
_EQUAL_TIME = 0.15  # relative difference of training times that count as equal
_MAX_MODELS = 6  # per test set: 15 pairs, few enough for Holm's correction
_MAX_HARDEST = 24  # images per test set
T = TypeVar("T")


@dataclass(frozen=True)
class Configuration:
    """Finished runs that differ only in their seed; at least one, sorted by seed."""

    runs: list[Record]

    @property
    def first(self) -> Record:
        return self.runs[0]

    @property
    def name(self) -> str:
        """The first run's folder name without its seed."""
        return self.first.folder.name.removesuffix(f"-s{self.first.constants.get('SEED')}")

    @property
    def accuracies(self) -> list[float]:
        return [run.metrics["test_accuracy"] for run in self.runs]

    @property
    def mean(self) -> float:
        return statistics.mean(self.accuracies)

    @property
    def std(self) -> float | None:
        """Standard deviation over seeds; None for a single seed."""
        return statistics.stdev(self.accuracies) if len(self.runs) > 1 else None

    @property
    def around(self) -> tuple[float, float]:
        """The 95 % interval of a single run; mean minus and plus std of several runs."""
        if self.std is None:
            return tuple(self.first.metrics["test_accuracy_95"])
        return max(0.0, self.mean - self.std), min(1.0, self.mean + self.std)

    @property
    def seconds(self) -> float:
        """Training time, averaged over seeds."""
        return statistics.mean(run.metrics["training_seconds"] for run in self.runs)

    @property
    def timing_is_valid(self) -> bool:
        """Whether all runs had the machine to themselves."""
        return all(run.timing_is_valid for run in self.runs)

    @property
    def validation_score(self) -> tuple[float, float]:
        """Validation accuracy; ties are broken by the lower validation loss."""
        best = [row for run in self.runs for row in run.history
                if row["epoch"] == run.metrics["best_epoch"]]  # fmt: skip
        accuracies = [run.metrics["val_accuracy"] for run in self.runs]
        return statistics.mean(accuracies), -statistics.mean(row["val_loss"] for row in best)


def welch(one: Configuration, other: Configuration) -> float:
    """The p-value of Welch's t-test on the test accuracies of two configurations over seeds."""
    from scipy.stats import ttest_ind  # slow to import

    return float(ttest_ind(one.accuracies, other.accuracies, equal_var=False).pvalue)


def group_by(items: Iterable[T], key: Callable[[T], object]) -> list[list[T]]:
    """Items with equal keys, in the order in which the keys first appear."""
    groups: dict[object, list[T]] = defaultdict(list)
    for item in items:
        groups[key(item)].append(item)
    return list(groups.values())


def distinct_labels(entries: Iterable[tuple[str, str, str]]) -> list[str]:
    """Labels for the rows of a table, or the lines of a chart.

    Args:
        entries: for each row its label, the group in which labels have to be distinct, and a more
            specific name, which is added in parentheses to a label that is not.
    """
    entries = list(entries)
    counts = Counter((label, group) for label, group, _ in entries)
    return [
        label if counts[label, group] == 1 else f"{label} ({name})"
        for label, group, name in entries
    ]


def configurations(runs: Iterable[Record]) -> list[Configuration]:
    """Finished runs grouped by configuration; the user's runs and reference runs are kept apart."""
    finished = [run for run in runs if run.metrics]
    configs = []
    for same in group_by(finished, lambda r: (
        r.comparable_key, r.key("SEED"), r.config.get("data"), r.model_code,
    )):  # fmt: skip
        same.sort(key=lambda run: str(run.config.get("started")))
        by_seed = {run.constants.get("SEED"): run for run in same}  # keeps the newest run
        seeds = sorted(by_seed, key=lambda seed: (seed is None, seed or 0))
        configs.append(Configuration([by_seed[seed] for seed in seeds]))
    return configs


def twins(configs: list[Configuration]) -> list[tuple[str, Configuration, Configuration]]:
    """ViTs from scratch and their CNN twins, trained the same way on the same images.

    Returns: which budget was equal, "epochs" or "seconds"; the ViT; the CNN.
    """
    pairs = []
    for cnn in (c for c in configs if "twin_of" in c.first.config and c.first.share == 1):
        # With VIT, the sizes in the record may be those of the recipe instead of the ViT's own.
        excluded = _NOT_SHARED_BY_TWINS + (_SIZES if cnn.first.constants.get("VIT") else ())
        shared = {k: v for k, v in cnn.first.constants.items() if k not in excluded}
        for vit in (c for c in configs if c.first.script == "train.py" and c.first.share == 1):
            constants = vit.first.constants
            if any(constants.get(k) != v for k, v in shared.items()):
                continue
            if vit.first.comparable_key != cnn.first.comparable_key:
                continue
            if vit.first.config.get("data") != cnn.first.config.get("data"):
                continue
            if not _is_matched(vit.first, cnn.first.config["twin_of"]):
                continue
            if constants["EPOCHS"] == cnn.first.constants["EPOCHS"]:
                pairs.append(("epochs", vit, cnn))
            elif (
                vit.timing_is_valid
                and cnn.timing_is_valid
                and abs(cnn.seconds - vit.seconds) <= _EQUAL_TIME * vit.seconds
            ):
                pairs.append(("seconds", vit, cnn))
    return pairs


def _is_matched(vit: Record, twin_of: dict[str, Any]) -> bool:
    """Whether a run trained the ViT that a CNN was matched to: same name and size."""
    own = {**vit.config["model"], "model": vit.model}
    keys = ("model", "parameters", "macs")
    is_vit = vit.constants.get("MODEL", "vit") == "vit"
    return is_vit and all(own[key] == twin_of[key] for key in keys if key in twin_of)


def on_most_images(configs: list[Configuration]) -> list[Configuration]:
    """Drops configurations if an otherwise equal one was trained on a larger part of the images.

    The comparison ignores the learning rate and weight decay, and skips trials of sweeps.
    """
    groups = group_by((c for c in configs if not c.first.sweep), lambda c: (
        c.first.comparable_key, c.first.key("SEED", "TRAIN_FRACTION", *_TUNED_CONSTANTS),
        c.first.model_code,
    ))  # fmt: skip
    most = [max(c.first.share for c in group) for group in groups]
    return [c for group, share in zip(groups, most, strict=True) for c in group
            if c.first.share == share]  # fmt: skip


def finetuning_groups(configs: list[Configuration]) -> list[list[Configuration]]:
    """The same pretrained weights on the same images, sorted by number of trained parameters.

    Groups whose modes were all trained on more images as well are left out.
    """
    kept = {c.first.folder for c in on_most_images(configs)}
    tuned = [c for c in configs if c.first.pretrained and not c.first.sweep]
    groups = group_by(tuned, lambda c: (
        c.first.comparable_key, c.first.key("SEED", *_MODE_CONSTANTS, *_TUNED_CONSTANTS),
    ))  # fmt: skip
    return [
        sorted(group, key=lambda c: c.first.config["model"]["trainable_parameters"])
        for group in groups
        if len(group) > 1 and any(c.first.folder in kept for c in group)
    ]


def efficiencies(configs: list[Configuration]) -> list[list[list[Configuration]]]:
    """Configurations that were trained on several fractions of the training images.

    Returns: a list per test set, of a list per model, of configurations sorted by fraction.
    """
    groups = group_by(configs, lambda c: (
        c.first.comparable_key, c.first.key("SEED", "TRAIN_FRACTION"), c.first.model_code,
    ))  # fmt: skip
    series = [sorted(group, key=lambda c: c.first.share) for group in groups if len(group) > 1]
    return group_by(series, lambda line: line[0].first.comparable_key)


@dataclass(frozen=True)
class Pair:
    """Two runs on the same test images, compared by McNemar's exact test."""

    a: Record
    b: Record
    only_a: int  # images that only a classifies correctly
    only_b: int
    p: float
    p_holm: float  # corrected for all pairs on these images


def select_models(configs: list[Configuration]) -> list[list[Record]]:
    """The runs to compare, at least two per test set; the user's own runs apart from references.

    For each model, patch size and version of model.py, the configuration with the best validation
    score is represented by its first seed. Test accuracy plays no role in the selection.
    """
    selected = []
    for same in group_by(on_most_images(configs), lambda c: c.first.comparable_key):
        by_model = group_by(same, lambda c: (
            c.first.task, c.first.model, str(c.first.constants.get("PATCH_SIZE")),
            c.first.model_code,
        ))  # fmt: skip
        best = [max(some, key=lambda c: c.validation_score) for some in by_model]
        best.sort(key=lambda c: c.validation_score, reverse=True)
        if len(best) > 1:
            selected.append([c.first for c in best[:_MAX_MODELS]])
    return selected


@dataclass(frozen=True)
class MainResults:
    """The three results that the report starts with; None for those that do not exist yet."""

    vit: Configuration | None  # trained from scratch
    cnn: Configuration | None  # its twin
    equal: str  # the budget that the twins share, "epochs" or "seconds"; "" if they are not twins
    finetuned: Configuration | None
    tied: int  # other ViTs with the same validation accuracy


def main_results(configs: list[Configuration]) -> MainResults:
    """The user's best ViT, its CNN twin and the best fine-tuned model, chosen by validation.

    Validation scores are comparable only on the same images, so those of the newest run count. A
    ViT with a twin takes precedence.
    """
    own = [c for c in on_most_images(configs) if not c.first.is_reference]

    def on_newest_images(some: list[Configuration]) -> list[Configuration]:
        newest = max(some, key=_started, default=None)
        return [c for c in some if newest and _test_set(c) == _test_set(newest)]

    def best(some: list[Configuration]) -> Configuration | None:
        return max(on_newest_images(some), key=lambda c: c.validation_score, default=None)

    pairs = sorted(twins(own), key=lambda pair: pair[0])  # equal epochs first
    scratch = [c for c in own if c.first.script == "train.py" and c.first.kind == "ViT"]
    vits = on_newest_images([vit for _, vit, _ in pairs] or scratch)
    vit = best(vits)
    cnns = [(equal, cnn) for equal, of, cnn in pairs if of is vit]
    if cnns:
        equal, cnn = cnns[0]
    else:
        equal, cnn = "", best([c for c in own if c.first.task == "CNN twin"])
    tuned = [c for c in own if c.first.pretrained and c.first.constants.get("MODE") != "scratch"]
    tied = {c.name for c in vits if vit and c is not vit
            and c.validation_score[0] == vit.validation_score[0]}  # fmt: skip
    return MainResults(vit, cnn, equal, best(tuned), len(tied))


def _started(c: Configuration) -> str:
    return max(run.config.get("started", "") for run in c.runs)


def _test_set(c: Configuration) -> str:
    return c.first.predictions.test_set


def compare_pairs(runs: list[Record]) -> list[Pair]:
    """All pairs of these runs: McNemar's exact test with Holm's correction."""
    both = list(combinations(runs, 2))
    tests = [stats.mcnemar(a.predictions.correct, b.predictions.correct) for a, b in both]
    adjusted = stats.holm([p for *_, p in tests])
    return [
        Pair(a, b, *test, p_holm)
        for (a, b), test, p_holm in zip(both, tests, adjusted, strict=True)
    ]


def hardest_images(runs: list[Record]) -> list[int]:
    """Indices of the images that most runs misclassify; ties: the most confident errors first."""
    wrong = np.stack([~run.predictions.correct for run in runs])  # (runs, N)
    confidence = np.stack([run.predictions.confidence for run in runs])
    count = wrong.sum(0)
    order = np.lexsort((-(confidence * wrong).sum(0), -count))[:_MAX_HARDEST]
    return [int(i) for i in order if count[i]]
