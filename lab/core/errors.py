"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake that the user can fix: the message says what is wrong, where, and how to fix it.

    `run_script` prints the message without a traceback.
    """


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type and arguments if it has no message."""
    return next(iter(str(error).splitlines()), "") or repr(error)
