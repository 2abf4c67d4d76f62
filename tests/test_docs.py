"""The documents: what is generated is up to date."""

from pathlib import Path

from docs import architecture, errors, observability


def test_the_figure_of_the_architecture_is_what_the_code_draws(tmp_path: Path) -> None:
    architecture.write("cifar10", tmp_path / "figure.svg")
    assert (tmp_path / "figure.svg").read_bytes() == architecture.FIGURE.read_bytes(), "run `make docs`"


def test_the_list_of_error_codes_is_that_of_the_code() -> None:
    assert errors.LIST.read_text() == errors.as_markdown(), "run `make docs`"


def test_the_table_of_metrics_is_that_of_the_code() -> None:
    guide = observability.GUIDE.read_text()
    assert guide == observability.with_table(guide), "run `make docs`"
