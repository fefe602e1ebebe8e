"""The data of the tests of fine-tuning."""

import pytest

from lab.data import load_data


@pytest.fixture(scope="session")
def data():
    return load_data("digits")
