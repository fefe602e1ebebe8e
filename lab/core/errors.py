"""The exception for mistakes that the user can fix."""


class UserError(Exception):
    """A mistake that the user can fix: the message says what is wrong, where, and how to fix it.

    `run_script` prints the message without a traceback.
    """
