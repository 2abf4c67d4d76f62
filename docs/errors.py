"""Writes docs/errors.md from the table of api.errors: `make docs`."""

from pathlib import Path

from api.errors import as_markdown

LIST = Path(__file__).with_name("errors.md")


def main() -> None:
    LIST.write_text(as_markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
