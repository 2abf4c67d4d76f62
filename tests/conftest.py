"""Gives all tests a clean environment, and prints the tested levels of CPU kernels at the head of a run."""

import pytest

from tests import environment

environment.clean()  # before any test module or product module reads a variable

from flowpp.levels import UnsupportedLevel  # noqa: E402
from tests.levels import in_words  # noqa: E402


def pytest_report_header() -> str:
    try:
        return in_words()
    except UnsupportedLevel as error:
        raise pytest.UsageError(str(error)) from error
