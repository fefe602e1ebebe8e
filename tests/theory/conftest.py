"""The folder theory/ is not a package: its scripts run from the command line."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "theory"))
