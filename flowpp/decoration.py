"""Decoration: plots and grids of results that are on disk already. A failing one costs a warning, and no result."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)


@contextmanager
def decoration(path: Path) -> Iterator[None]:
    """Logs a warning with the reason if the block, which draws the file `path`, raises an exception.

    Write every result before the block: what draws may fail for reasons of the machine (fonts, configuration, disk).
    """
    try:
        yield
    except Exception as error:
        log.warning("%s could not be drawn: %s: %s", path.name, type(error).__name__, error)
