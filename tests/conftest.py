"""What `make test` prints first: the levels of CPU kernels at which the tests run."""

import pytest

from flowpp.levels import UnsupportedLevel
from tests.levels import in_words


def pytest_report_header() -> str:
    try:
        return in_words()
    except UnsupportedLevel as error:
        raise pytest.UsageError(str(error)) from error
