"""benchmarks/RESULTS.md: a section a benchmark, each written by the command that measured it."""

import datetime
import os
import platform
import re
from pathlib import Path
from typing import TYPE_CHECKING

from flowpp.durable import replace_file

if TYPE_CHECKING:
    import torch

RESULTS = Path(__file__).with_name("RESULTS.md")

HEAD = """# Measured figures

Each section is written by the command that it names; none is edited by hand.
"""


def write_section(title: str, command: str, body: str, device: "torch.device | None") -> None:
    """Puts a section in the place of the one of the same title, or at the end; without a device torch had no part."""
    section = f"## {title}\n\n`{command}`, {datetime.date.today()}, {machine(device)}\n\n{body.strip()}\n"
    text = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else HEAD
    found = re.search(rf"^## {re.escape(title)}$.*?(?=^## |\Z)", text, re.DOTALL | re.MULTILINE)
    if found:
        text = text[: found.start()] + section + ("\n" if found.end() < len(text) else "") + text[found.end() :]
    else:
        text = text.rstrip("\n") + "\n\n" + section
    replace_file(RESULTS, text.encode())


def machine(device: "torch.device | None") -> str:
    """The device, the processor with the threads used, and the versions."""
    cpu = next(
        (line.partition(": ")[2] for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.machine(),
    )
    if device is None:
        return f"{cpu}, {os.cpu_count()} cores; Python {platform.python_version()}"
    import torch  # here, as benchmarks of the service alone run without it

    gpu = f"{torch.cuda.get_device_name(device)}, " if device.type == "cuda" else ""
    return (
        f"{gpu}{cpu}, {torch.get_num_threads()} threads; torch {torch.__version__}, Python {platform.python_version()}"
    )


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table; all columns but the first are numbers."""
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)
