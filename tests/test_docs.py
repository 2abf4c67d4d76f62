"""The documents: what is generated is up to date."""

import ast
import re
from pathlib import Path

from docs import architecture, configuration, errors, observability, settings
from tests.service.house import FAULTS

ROOT = Path(__file__).parents[1]


def test_the_figure_of_the_architecture_is_what_the_code_draws(tmp_path: Path) -> None:
    architecture.write("cifar10", tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == architecture.FIGURE.read_bytes(), "run `make docs`"


def test_the_table_of_fields_is_that_of_the_code() -> None:
    assert configuration.LIST.read_text() == configuration.as_markdown(), "run `make docs`"


def test_the_list_of_error_codes_is_that_of_the_code() -> None:
    assert errors.LIST.read_text() == errors.as_markdown(), "run `make docs`"


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    guide = observability.GUIDE.read_text()
    assert guide == observability.with_table(guide), "run `make docs`"


def test_the_table_of_settings_is_that_of_the_code() -> None:
    assert settings.LIST.read_text() == settings.as_markdown(), "run `make docs`"


def test_every_test_that_the_operations_guide_names_exists_and_every_fault_is_in_its_table() -> None:
    guide = (ROOT / "docs" / "operations.md").read_text()
    named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)(?:\[([^\]]+)\])?`", guide)
    assert len(named) > 25
    for file, test, _ in named:
        module = ast.parse((ROOT / file).read_text())
        assert test in {node.name for node in ast.walk(module) if isinstance(node, ast.FunctionDef)}, (file, test)
    assert {case for _, _, case in named if case} == FAULTS.keys()
