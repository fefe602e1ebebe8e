"""What a sweep varies: constants of a training script, with choices or a range for each.

SPACE reads `LEARNING_RATE=log:3e-4..1e-2 DEPTH=2..8 BATCH_SIZE=16,32,64`.
"""

import argparse
import difflib
import importlib.util
import math
import random
import re
import shlex
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import optuna
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial

from lab.core import UserError, constants

Distribution = CategoricalDistribution | FloatDistribution | IntDistribution
Space = dict[str, Distribution]
Params = dict[str, Any]  # the value of each swept constant in one trial

MAX_TRIALS = 10_000
_ROOT = Path(__file__).resolve().parents[2]
_MAX_DRAWS = 200  # draws without a new point after which the space counts as exhausted
_SAMPLERS = {
    "grid": optuna.samplers.BruteForceSampler,  # every point once, in random order
    "random": optuna.samplers.RandomSampler,
    "tpe": partial(optuna.samplers.TPESampler, constant_liar=True),  # other trials are running
}
_SET_BY_SWEEP = {"NUM_SEEDS": 1, "OVERWRITE": False, "SNAPSHOTS": 0}  # where they exist
_NOT_SWEPT = {
    **dict.fromkeys(("NAME", "RESULTS_DIR", *_SET_BY_SWEEP), "the sweep sets it for each trial"),
    **dict.fromkeys(("DATA_DIR", "TENSORBOARD"), "it does not change the result"),
    **dict.fromkeys(("DATASET", "VAL_FRACTION", "SKIP_UNREADABLE"),
                    "accuracies on other validation images cannot be compared"),
}  # fmt: skip


@dataclass(frozen=True)
class Script:
    """A training script and its constants, as its command line parses them."""

    path: Path
    parser: argparse.ArgumentParser
    fixed: list[str]  # flags of every trial
    values: dict[str, Any]  # every constant, with `fixed` applied
    changed: set[str]  # the constants that `fixed` changes

    @classmethod
    def load(cls, name: str, fixed: str) -> "Script":
        """Imports the script `name`; `fixed` are flags for every trial.

        The name may be relative to the working directory or to this project.

        Raises: UserError for a file that is not a training script, and for wrong flags.
        """
        words = _split("FIXED", fixed)
        path = next((p for p in (Path(name), _ROOT / name) if p.is_file()), None)
        if path is None or path.suffix != ".py":
            folders = {Path(name).parent, (_ROOT / name).parent}
            scripts = sorted({p.name for folder in folders for p in folder.glob("*.py")})
            raise UserError(f"SCRIPT={name!r} does not exist{_suggest(Path(name).name, scripts)}")
        parser = _parser_of(path)
        defaults, values = (_parse(parser, flags, "FIXED") for flags in ([], words))
        if not {"EPOCHS", "NAME", "RESULTS_DIR"} <= values.keys():
            raise UserError(f"SCRIPT={name!r} does not train: it has no EPOCHS. Use train.py, "
                            "finetune.py or another training script")  # fmt: skip
        changed = {key for key in values if values[key] != defaults[key]}
        if own := changed & {"NAME", "RESULTS_DIR", *_SET_BY_SWEEP}:
            raise UserError(f"FIXED cannot contain {min(own)}: {_NOT_SWEPT[min(own)]}")
        return cls(path, parser, words, values, changed)

    def flags(self, params: Params) -> list[str]:
        """The command line of a trial, without its name and results folder."""
        own = {key: value for key, value in _SET_BY_SWEEP.items() if key in self.values}
        return self.fixed + constants.as_flags({**own, **params})

    def parse_value(self, name: str, text: str) -> Any:
        """Converts text to a value of a constant, as the script's command line does.

        Raises: UserError if the constant does not accept it.
        """
        is_switch = any(
            isinstance(action, argparse.BooleanOptionalAction) and action.dest == name
            for action in self.parser._actions
        )
        if is_switch and text not in ("true", "false"):
            raise UserError(f"SPACE: {name}={text}: choose true or false")
        words = constants.as_flags({name: {"true": True, "false": False}.get(text, text)})
        return _parse(self.parser, words, f"SPACE: {name}={text}")[name]


def parse_space(text: str, script: Script, sampler: str) -> Space:
    """The distribution of each constant in SPACE.

    Raises: UserError for an unknown constant, a value that it does not accept, an empty range, and
        constants that cannot be swept.
    """
    space: Space = {}
    for word in _split("SPACE", text):
        name, _, values = word.partition("=")
        if not values:
            raise UserError(f"SPACE: {word!r} must be NAME=a,b,c or NAME=low..high")
        if name not in script.values:
            hint = _suggest(name.upper(), [*script.values])
            raise UserError(f"SPACE: {script.path} has no constant {name}{hint}")
        if name in _NOT_SWEPT:
            raise UserError(f"SPACE cannot contain {name}: {_NOT_SWEPT[name]}")
        if name in space or name in script.changed:
            where = "SPACE twice" if name in space else "SPACE and in FIXED"
            raise UserError(f"{name} is in {where}: remove one of them")
        space[name] = _distribution(script, name, values)
    if not space:
        raise UserError("SPACE is empty. Example: LEARNING_RATE=log:1e-4..1e-2")
    if sampler == "grid" and (points := num_points(space)) > MAX_TRIALS:
        raise UserError(f"SAMPLER=grid tries every point, but SPACE has {points:,} (at most "
                        f"{MAX_TRIALS:,}): write NAME=a,b,c or use SAMPLER=random")  # fmt: skip
    if "all" in getattr(space.get("MODE"), "choices", [script.values.get("MODE")]):
        raise UserError("MODE=all starts many runs, but a trial is one run: sweep MODE=head,full")
    return space


def num_points(space: Space) -> float:
    """How many points a space has; infinite if it has a range."""
    return math.prod(len(getattr(kind, "choices", ())) or math.inf for kind in space.values())


def next_point(space: Space, sampler: str, seed: int, trials: list[FrozenTrial]) -> Params | None:
    """A point that no trial has used, or None if the space is exhausted.

    The draw depends only on the seed and on the earlier trials, so a sweep that was interrupted
    continues with the points that it would have tried. Floats get four significant digits.
    """
    own_seed = random.Random(f"{seed} {len(trials)}").getrandbits(32)
    study = optuna.create_study(direction="maximize", sampler=_SAMPLERS[sampler](seed=own_seed))
    study.add_trials(trials)
    tried = [{name: trial.params[name] for name in space} for trial in trials]
    for _ in range(_MAX_DRAWS):
        params = study.ask(space).params
        for name, kind in space.items():
            if isinstance(kind, FloatDistribution):
                params[name] = min(max(float(f"{params[name]:.4g}"), kind.low), kind.high)
        if params not in tried:
            return params
    return None


def format_value(value: Any) -> str:
    """A value as the command line and folder names spell it."""
    return str(value).lower() if isinstance(value, bool) or value is None else str(value)


def _parser_of(path: Path) -> argparse.ArgumentParser:
    """Imports a script; returns the argument parser that its main() builds from its constants.

    main() runs only until it would read the command line. The script itself has to build the
    parser, because only its call says which constants it inherits from another script.
    """
    parsers: list[argparse.ArgumentParser] = []

    def stop(parser: argparse.ArgumentParser, *_: Any, **__: Any) -> None:
        parsers.append(parser)
        sys.exit()

    spec = importlib.util.spec_from_file_location("swept_script", path)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    try:
        with mock.patch.object(sys, "path", [str(path.resolve().parent), *sys.path]):
            spec.loader.exec_module(module)
        with mock.patch.object(argparse.ArgumentParser, "parse_known_args", stop):
            getattr(module, "main", int)()
    except Exception as error:  # any error in a user's script
        raise UserError(f"SCRIPT={str(path)!r} cannot be imported: {error}") from error
    except SystemExit:
        if not parsers:
            raise  # the script has said why, such as a constant of the wrong type
    if not parsers:
        raise UserError(f"SCRIPT={str(path)!r} has no main() that reads constants as flags")
    return parsers[0]


def _parse(parser: argparse.ArgumentParser, words: list[str], origin: str) -> dict[str, Any]:
    """Every constant by name. Raises: UserError that starts with `origin`."""

    def error(message: str) -> None:
        raise UserError(f"{origin}: {message}")

    parser.error = error
    return vars(parser.parse_args(words))


def _distribution(script: Script, name: str, text: str) -> Distribution:
    """The distribution that `a,b,c`, `low..high` or `log:low..high` describes."""
    if match := re.fullmatch(r"(log:)?(.+?)\.\.(.+)", text):
        low, high = (script.parse_value(name, match[i]) for i in (2, 3))
        if not isinstance(low, str):
            if low is None or high is None or low >= high:
                raise UserError(f"SPACE: {name}={text}: the low end must be below the high end")
            if match[1] and low <= 0:
                raise UserError(f"SPACE: {name}={text}: a logarithmic range must start above 0")
            kind = IntDistribution if isinstance(low, int) else FloatDistribution
            return kind(low, high, log=bool(match[1]))
    choices = [script.parse_value(name, part) for part in text.split(",")]
    if len(set(choices)) < len(choices):
        raise UserError(f"SPACE: {name}={text} contains a duplicate value")
    if len(choices) == 1:
        raise UserError(f"SPACE: {name}={text} is a single value: put it in FIXED")
    return CategoricalDistribution(choices)


def _split(constant: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{constant}={text!r} cannot be read: {error}") from error


def _suggest(name: str, names: list[str]) -> str:
    close = difflib.get_close_matches(name, names, 3)
    return f"; did you mean {' or '.join(close)}?" if close else f"; choose from {', '.join(names)}"
