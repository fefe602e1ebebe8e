"""The data of the tests of training."""

import pytest

from lab.data import load_data


@pytest.fixture(scope="session")
def data():
    return load_data("digits")
