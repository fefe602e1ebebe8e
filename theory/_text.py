"""How the texts are checked: every number and every comparison must come from the script.

A script computes phrases ("94.6 % of 298 test images", "beats the center") and calls `check`. The
text must contain each phrase exactly once, and each number and each comparison of the text must be
part of a phrase. Only the patterns in EXEMPT, such as years, need no phrase. `_mutations.py` proves
that the check can fail.
"""

import re
import sys
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for model.py and lab/, whatever the current folder is

NUMBER = re.compile(r"(?<![A-Za-z_\d.])\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?<!,)")
EXEMPT = {  # numbers, and words such as "below", that are not results
    "target of a link": re.compile(r"\]\([^)]*\)|https?://\S+|<!--.*?-->", re.DOTALL),
    "number of a heading or list item": re.compile(r"^ *(?:#+ )?\d+\. ", re.MULTILINE),
    "year of a publication": re.compile(
        r"\b[A-Z][\w'-]+(?:,? et al\.| and [A-Z][\w'-]+)?,?\s+\(?(?:19|20)\d\d\b"
    ),
    "place in a publication": re.compile(
        r"\b(?:[Ss]ections?|[Tt]ables?|[Ff]igures?|[Ff]ig\.|[Ee]quations?|[Aa]ppendix)\s+"
        r"(?:[A-Z]\.?)?\d[\d.]*(?:(?:,\s+|\s+and\s+)\d[\d.]*\d)*"
    ),
    "name": re.compile(r"\b[A-Za-z]+[A-Z]?(?:-[A-Z][a-z]?)?[-/]\d+\b(?![.,]\d)"),  # CIFAR-10, B/16
    "place on the page": re.compile(
        r"\b(?:[Nn]umbers?|[Tt]able|[Ff]igure|[Ff]ormulas?|[Cc]laims?|[Ee]xample|everything|lines?)\s+"
        r"(?:above|below)\b"
    ),
    "index": re.compile(r"_\{?\d+"),  # x_1 in a formula
}
_PAIRS = (
    "more/fewer, less/more, above/below, higher/lower, larger/smaller, greater/smaller, "
    "better/worse, faster/slower, longer/shorter, deeper/shallower, wider/narrower, "
    "stronger/weaker, easier/harder, closer/farther, first/last, "
    "beats/loses to, beat/lose to, rises/falls, rise/fall, grows/shrinks, grow/shrink, "
    "increases/decreases, increase/decrease, improves/worsens, improve/worsen, most/least, "
    "largest/smallest, highest/lowest, best/worst, ahead/behind, exceeds/is below, "
    "cheaper/dearer, nearer/farther, earlier/later"
)
OPPOSITES = dict(pair.split("/") for pair in _PAIRS.split(", "))
OPPOSITES = {second: first for first, second in OPPOSITES.items()} | OPPOSITES
COMPARISON = re.compile(
    rf"\b(?:{'|'.join(sorted(OPPOSITES, key=len, reverse=True))})\b", re.IGNORECASE
)


def check(script: str, said: dict[str, str], sources: dict[str, str]) -> None:
    """Prints what was computed, and fails if the text beside the script says anything else.

    Args:
        script: `__file__` of the script; the text is the .md file of the same name.
        said: what was computed, and the phrase that the text must contain exactly once. A phrase
            with a comparison ("beats the Gaussian by more than 10 points") comes from `claim`.
        sources: phrases with numbers or comparisons that come from a publication or a definition,
            and where they come from.

    Raises: AssertionError, which lists every difference.
    """
    path = Path(script).with_suffix(".md")
    text = path.read_text(encoding="utf-8")
    for what, phrase in said.items():
        print(f"{what}: {phrase}")
    for phrase, source in sources.items():
        print(f"{source}: {phrase}")
    found = problems(text, said, sources)
    assert not found, f"{path.name}:\n  " + "\n  ".join(found)


def claim(phrase: str, *conditions: bool) -> str:
    """A phrase that may be said only if all conditions hold, such as `a > b` for "a beats b"."""
    assert conditions, f"no condition for {phrase!r}"
    assert all(conditions), f"not true: {phrase!r} {conditions}"
    return phrase


def problems(text: str, said: dict[str, str], sources: dict[str, str]) -> list[str]:
    """What is wrong with a text; nothing if it says what was computed, and nothing else."""
    found, spans = [], []
    for phrase in [*said.values(), *sources]:
        places = [match.span() for match in _pattern(phrase).finditer(text)]
        spans += places
        if len(places) != 1:
            found.append(f"should say exactly once, says {len(places)} times: {phrase!r}")
    for match in occurrences(text, NUMBER) + occurrences(text, COMPARISON):
        if not any(start <= match.start() and match.end() <= end for start, end in spans):
            line = text.count("\n", 0, match.start()) + 1
            found.append(f"line {line}: no phrase of the script contains {match.group()!r}")
    return found


def occurrences(text: str, pattern: re.Pattern) -> list[re.Match]:
    """Matches of NUMBER or COMPARISON that are not exempt."""
    exempt = [match.span() for kind in EXEMPT.values() for match in kind.finditer(text)]
    return [
        match
        for match in pattern.finditer(text)
        if not any(start <= match.start() and match.end() <= end for start, end in exempt)
    ]


@cache
def _pattern(phrase: str) -> re.Pattern:
    """Finds a phrase, with any line breaks in it, and not as a part of a longer number."""
    words = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<![\w.,+\u2212-])" if phrase[0].isdigit() else ""
    after = r"(?!\w|[.,]\d)" if phrase[-1].isalnum() else ""
    return re.compile(before + words + after)
