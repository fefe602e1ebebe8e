"""Every number in the texts of theory/ is computed, and what is computed stands in the text."""

import subprocess
import sys
from pathlib import Path

import pytest

THEORY = Path(__file__).resolve().parent.parent / "theory"
TOPICS = sorted(THEORY.glob("[!_]*.py"))


@pytest.mark.parametrize("path", TOPICS, ids=lambda path: path.stem)
def test_text_says_what_is_computed(path):
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert path.with_suffix(".md").exists()


def test_pictures_and_links_of_the_texts_exist():
    for text in THEORY.glob("*.md"):
        for link in text.read_text(encoding="utf-8").split("](")[1:]:
            target = link.split(")")[0].split("#")[0]
            if not target.startswith("http"):
                assert (THEORY / target).exists(), f"{text.name}: {target}"
