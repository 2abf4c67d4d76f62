"""Writes the table of metrics in docs/observability.md: `make docs`."""

from pathlib import Path

import api.observation  # noqa: F401  # whose metrics are then known, too
from worker.metrics import FAMILIES

GUIDE = Path(__file__).with_name("observability.md")

BEGIN, END = "<!-- metrics: written by `make docs` -->\n", "<!-- end of metrics -->\n"


def table() -> str:
    """All metrics as Markdown, by name."""
    rows = ["| metric | kind | labels | served by | meaning |", "|---|---|---|---|---|"]
    for family in sorted(FAMILIES):
        labels = ", ".join(f"`{label}`" for label in family.labels)
        rows.append(f"| `{family.name}` | {family.kind} | {labels} | {family.where} | {family.meaning} |")
    return "\n".join(rows) + "\n"


def with_table(text: str) -> str:
    """The guide, with the table as the code has it."""
    before, _, rest = text.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}{table()}{END}{after}"


def main() -> None:
    GUIDE.write_text(with_table(GUIDE.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    main()
