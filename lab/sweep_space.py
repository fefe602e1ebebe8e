"""What a sweep tries: constants with choices or ranges, checked before any run, and in which order.

SPACE reads `LEARNING_RATE=log:3e-4..1e-2 EMBED_DIM=32..128 BATCH_SIZE=16,32,64`.
"""

import itertools
import math
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import optuna
from optuna import distributions
from optuna.trial import FrozenTrial

from lab.core.constants import kind
from lab.core.errors import UserError
from lab.sweep_script import OURS, Params, Script, named, near, split

JUDGE = "changes the validation images, and accuracies on other images cannot be compared"
NOT_SWEPT = {
    **dict.fromkeys(OURS, "is set by the sweep, for each trial"),
    **dict.fromkeys(("DATA_DIR", "TENSORBOARD"), "changes no result"),
    **dict.fromkeys(("DATASET", "VAL_FRACTION", "SKIP_UNREADABLE"), JUDGE),
}
RANGE = re.compile(r"(log:)?(.+?)\.\.(.+)")
REPEATS = 200  # draws in a row that bring nothing new: the space is used up


@dataclass(frozen=True)
class Parameter:
    """A constant and what is tried: choices, or a range from `low` to `high`, both included."""

    name: str
    choices: tuple[Any, ...] = ()
    low: float = 0
    high: float = 0
    log: bool = False  # drawn, and plotted, on a logarithmic scale

    @property
    def distribution(self) -> distributions.BaseDistribution:
        """The same for Optuna."""
        if self.choices:
            return distributions.CategoricalDistribution(self.choices)
        whole = isinstance(self.low, int)
        drawn = distributions.IntDistribution if whole else distributions.FloatDistribution
        return drawn(self.low, self.high, log=self.log)

    def rounded(self, value: Any) -> Any:
        """A drawn number with the four digits that a reader can take in."""
        if self.choices or isinstance(value, int):
            return value
        return min(max(float(f"{value:.4g}"), self.low), self.high)

    def __str__(self) -> str:
        if self.choices:
            return f"{self.name}={','.join(map(show, self.choices))}"
        return f"{self.name}={'log:' * self.log}{show(self.low)}..{show(self.high)}"


def parse_space(text: str, script: Script, sampler: str) -> list[Parameter]:
    """The parameters of SPACE.

    Raises: UserError, for a name that is no constant of the script, a value that the constant
        cannot have, a range that is empty, and what cannot be swept.
    """
    space: dict[str, Parameter] = {}
    for word in split("SPACE", text):
        name, _, values = word.partition("=")
        if not values:
            raise UserError(f"SPACE: {word!r} must be NAME=a,b,c or NAME=low..high")
        if name not in script.types:
            raise UserError(f"SPACE: {script.path} has no constant {name}"
                            f"{near(name.upper(), script.types)}")  # fmt: skip
        if name in NOT_SWEPT:
            raise UserError(f"SPACE: {name} cannot be swept: it {NOT_SWEPT[name]}")
        if name in named(script.fixed):
            raise UserError(f"{name} is in SPACE and in FIXED: take it out of one of them")
        if name in space:
            raise UserError(f"SPACE has {name} twice")
        space[name] = parse_values(name, values, script.types[name])
    if not space:
        raise UserError("SPACE is empty: say what to try, such as LEARNING_RATE=log:1e-4..1e-2")
    ranges = [p for p in space.values() if not p.choices]
    if sampler == "grid" and ranges:
        raise UserError(f"SAMPLER=grid needs choices, and {ranges[0]} is a range: write "
                        f"{ranges[0].name}=a,b,c, or take SAMPLER=random")  # fmt: skip
    modes = space["MODE"].choices if "MODE" in space else [script.values.get("MODE")]
    if "all" in modes:
        raise UserError("MODE=all is many runs and a trial is one: name modes in SPACE, such as "
                        "MODE=head,full, or one in FIXED")  # fmt: skip
    return list(space.values())


def parse_values(name: str, text: str, annotation: Any) -> Parameter:
    """`a,b,c`, `low..high` or `log:low..high`, read as the command line reads the constant."""
    how, match = kind(annotation), RANGE.fullmatch(text)
    numeric = how.get("metavar", "").split("|")[0] in ("INT", "FLOAT")
    if numeric and match:
        low, high = (value_of(name, match[i], how) for i in (2, 3))
        if low is None or high is None or not low < high:
            raise UserError(f"SPACE: {name}={text}: the low end must be below the high end")
        if match[1] and low <= 0:
            raise UserError(f"SPACE: {name}={text}: a logarithmic range must start above 0")
        return Parameter(name, low=low, high=high, log=bool(match[1]))
    if numeric and text.startswith("log:"):
        raise UserError(f"SPACE: {name}={text}: log: needs a range, such as {name}=log:1e-4..1e-2")
    choices = tuple(value_of(name, part, how) for part in text.split(","))
    if len(set(choices)) < len(choices):
        raise UserError(f"SPACE: {name}={text} has a value twice")
    if len(choices) == 1:
        raise UserError(f"SPACE: {name}={text} is one value: it belongs into FIXED")
    return Parameter(name, choices)


def value_of(name: str, text: str, how: dict[str, Any]) -> Any:
    """A value as the command line would read it; `how` is `lab.core.constants.kind` of its type."""
    options = how.get("choices", (True, False) if "action" in how else ())
    for option in options:
        if text.lower() == show(option).lower():
            return option
    try:
        value = None if options else how["type"](text)
        if not options and not (isinstance(value, float) and not math.isfinite(value)):
            return value
    except ValueError:
        pass
    wanted = " or ".join(map(show, options)) or how["type"].__name__
    raise UserError(f"SPACE: {name} cannot be {text!r}: it takes {wanted}")


def walk(space: list[Parameter], sampler: str, seed: int) -> Iterator[Params]:
    """Every point of the grid once, or random points without end, none of them twice.

    The order follows from the seed alone. A grid is shuffled, so that one that is stopped has seen
    all of the space, and pruning does not compare within one corner of it.
    """
    if sampler == "grid":
        points = list(itertools.product(*(parameter.choices for parameter in space)))
        random.Random(seed).shuffle(points)
        yield from ({p.name: v for p, v in zip(space, point, strict=True)} for point in points)
    else:
        yield from unseen(space, optuna.samplers.RandomSampler(seed), [])


def suggest(space: list[Parameter], seed: int, trials: list[FrozenTrial]) -> Params | None:
    """The next point of Optuna's TPE after these trials; None where it finds no new one."""
    sampler = optuna.samplers.TPESampler(seed=seed + len(trials), constant_liar=True)
    return next(unseen(space, sampler, trials), None)


def unseen(
    space: list[Parameter], sampler: optuna.samplers.BaseSampler, trials: list[FrozenTrial]
) -> Iterator[Params]:
    """Points that a sampler of Optuna's draws, in a study in memory, and that are new."""
    study = optuna.create_study(sampler=sampler, direction="maximize")
    study.add_trials(trials)
    seen, repeats = {tuple(t.params[p.name] for p in space) for t in trials}, 0
    while repeats < REPEATS:
        drawn = study.ask({p.name: p.distribution for p in space}).params
        params = {p.name: p.rounded(drawn[p.name]) for p in space}
        point = tuple(params.values())
        repeats = repeats + 1 if point in seen else 0
        if not repeats:
            seen.add(point)
            yield params


def show(value: Any) -> str:
    """A value for people, and for the names of folders."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)
