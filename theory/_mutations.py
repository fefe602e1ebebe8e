"""Does the check of the texts fail when it should? Changes every number, flips every comparison.

python theory/_mutations.py              # all mutations of all texts: how many are caught
python theory/_mutations.py patches      # of one text
python theory/_mutations.py --exempt     # lists the numbers that are exempt, such as years

Each script runs once. Then every digit of every number in its text is changed, one at a time, and
every comparison is replaced by its opposite ("higher" by "lower"). A mutation is caught if the
changed text no longer agrees with what the script computed.
"""

import contextlib
import io
import random
import runpy
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import _text

THEORY = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Mutation:
    kind: str  # number or comparison
    line: int
    before: str
    after: str
    text: str  # the whole text with this change


def scripts() -> list[Path]:
    return sorted(THEORY.glob("[!_]*.py"))


def computed(script: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Runs a script without its check.

    Returns: the phrases it computed, and the phrases it takes from sources.
    """
    calls = []

    def record(path: str, said: dict[str, str], sources: dict[str, str]) -> None:
        calls.append((said, sources))

    arguments = patch.object(sys, "argv", [str(script)])
    with patch.object(_text, "check", record), arguments, contextlib.redirect_stdout(io.StringIO()):
        runpy.run_path(str(script), run_name="__main__")
    (call,) = calls
    return call


def mutations(text: str) -> Iterator[Mutation]:
    """Every digit of every number changed by one, and every comparison flipped."""
    for match in _text.occurrences(text, _text.NUMBER):
        for at in range(match.start(), match.end()):
            if text[at].isdigit():
                digit = str((int(text[at]) + 1) % 10)
                yield _replaced("number", text, match.span(), at, at + 1, digit)
    for match in _text.occurrences(text, _text.COMPARISON):
        opposite = _text.OPPOSITES[match.group().lower()]
        if match.group()[0].isupper():
            opposite = opposite.capitalize()
        yield _replaced("comparison", text, match.span(), *match.span(), opposite)


def _replaced(
    kind: str, text: str, span: tuple[int, int], start: int, end: int, new: str
) -> Mutation:
    after = text[span[0] : start] + new + text[end : span[1]]
    line = text.count("\n", 0, start) + 1
    return Mutation(kind, line, text[slice(*span)], after, text[:start] + new + text[end:])


def survivors(
    script: Path, said: dict[str, str], sources: dict[str, str], sample: int | None = None
) -> tuple[list[Mutation], list[Mutation]]:
    """Mutates the text of a script.

    Args:
        script: a script of this folder; its text must pass the check.
        said, sources: from `computed`.
        sample: how many mutations to try, drawn at random; None: all.

    Returns: the mutations that were tried, and those that were not caught.
    """
    text = script.with_suffix(".md").read_text(encoding="utf-8")
    assert not (found := _text.problems(text, said, sources)), "\n".join([script.name, *found])
    tried = list(mutations(text))
    if sample is not None and sample < len(tried):
        tried = random.Random(0).sample(tried, sample)
    return tried, [m for m in tried if not _text.problems(m.text, said, sources)]


def main() -> None:
    names = [name for name in sys.argv[1:] if not name.startswith("-")]
    chosen = [script for script in scripts() if not names or script.stem in names]
    if "--exempt" in sys.argv:
        for script in chosen:
            text = script.with_suffix(".md").read_text(encoding="utf-8")
            for reason, pattern in _text.EXEMPT.items():
                for match in pattern.finditer(text):
                    if any(letter.isdigit() for letter in match.group()):
                        print(f"{script.stem}: {reason}: {' '.join(match.group().split())}")
        return
    total = {"number": [0, 0], "comparison": [0, 0]}
    for script in chosen:
        tried, missed = survivors(script, *computed(script))
        counts = []
        for kind, sums in total.items():
            every = sum(m.kind == kind for m in tried)
            caught = every - sum(m.kind == kind for m in missed)
            sums[0] += caught
            sums[1] += every
            counts.append(f"{kind}s {caught} of {every} caught")
        print(f"{script.stem}: {', '.join(counts)}")
        for m in missed:
            print(f"    survived, line {m.line}: {m.before!r} -> {m.after!r}")
    caught, every = (sum(sums[i] for sums in total.values()) for i in (0, 1))
    parts = ", ".join(f"{kind}s {a} of {b}" for kind, (a, b) in total.items())
    print(f"all: {caught} of {every} mutations caught ({100 * caught / every:.1f} %): {parts}")


if __name__ == "__main__":
    main()
