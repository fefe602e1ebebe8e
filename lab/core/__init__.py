"""What every script needs: constants as flags, run folders, checkpoints, processes, statistics.

Open `constants.py` first to see how a constant becomes a flag; `script_source.py` reads the script.
Then open `runs.py` to see what a run's folder contains and how a run finds its folder again, by
`identity.py`; `run_folders.py` creates and locks folders. `child.py` starts other programs.
"""

from lab.core.errors import UserError
from lab.core.runs import Run

__all__ = [
    "Run",
    "UserError",
    "checkpoints",
    "child",
    "constants",
    "machine",
    "plots",  # loads matplotlib: import it only where a figure is drawn
    "runtime",
    "stats",
    "web_page",
]
