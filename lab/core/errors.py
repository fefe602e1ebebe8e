"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake that the user can fix: the message says what is wrong, where, and how to fix it.

    `run_script` prints the message without a traceback.
    """


def __getattr__(name: str) -> object:
    """Names that have moved to `lab.core.runtime`, until all imports are converted."""
    from lab.core import runtime

    try:
        return getattr(runtime, name)
    except AttributeError:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}") from None
