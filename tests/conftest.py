"""Prints the tested levels of CPU kernels at the head of a test run."""

import pytest

from flowpp.levels import UnsupportedLevel
from tests.levels import in_words


def pytest_report_header() -> str:
    try:
        return in_words()
    except UnsupportedLevel as error:
        raise pytest.UsageError(str(error)) from error
