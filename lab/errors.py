"""Mistakes that a user can mend end as one sentence, never as a traceback."""

import sys
from collections.abc import Callable

from model import ConfigError


class UserError(Exception):
    """What is wrong, where, and what to do about it, in words for the person at the keyboard."""


def run_script(main: Callable[[], object]) -> None:
    """Runs a script's `main`; a user's mistake is printed and ends the process with status 2."""
    try:
        main()
    except (UserError, ConfigError) as error:
        print(f"\nerror: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)
