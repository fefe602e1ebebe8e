"""The exception for mistakes that the user can fix, and parts of its messages."""

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake that the user can fix: the message says what is wrong, where, and how to fix it.

    `run_script` prints the message without a traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type and arguments if it has no message."""
    return next(iter(str(error).splitlines()), "") or repr(error)


def suggest(word: str, words: Iterable[str], cutoff: float = 0.6) -> str:
    """`; did you mean ...?`, or nothing if no word comes close."""
    by_case = {candidate.lower(): candidate for candidate in words}
    close = difflib.get_close_matches(word.lower(), by_case, 1, cutoff)
    return f"; did you mean {by_case[close[0]]}?" if close else ""
