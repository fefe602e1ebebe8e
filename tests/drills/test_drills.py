"""A few attempts of every drill; `python -m tests.drills` makes many."""

import sys

import pytest

from tests.drills import DRILLS
from tests.drills.__main__ import attempt

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="processes of POSIX")
ATTEMPTS = {"hostile_weights": 5, "hostile_names": 5, "hostile_images": 5}  # these are fast


@pytest.mark.parametrize("name", DRILLS)
def test_a_drill_loses_nothing(name):
    for number in range(ATTEMPTS.get(name, 1)):
        assert attempt(name, seed=0, number=number) is None
