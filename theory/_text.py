"""What the texts of this folder share: numbers are computed, printed, and must stand in them."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # for model.py and lab/, from wherever a script is called


def check(script: str, said: dict[str, str]) -> None:
    """Prints what was computed, step by step, and fails if the text beside the script differs.

    Args:
        script: `__file__` of the script; the text is the .md of the same name.
        said: for each step what it is, and the words that the text must hold.
    """
    path = Path(script).with_suffix(".md")
    text = " ".join(path.read_text(encoding="utf-8").split())
    for what, words in said.items():
        print(f"{what}: {words}")
        assert words in text, f"{path.name} does not say {words!r} ({what})"
