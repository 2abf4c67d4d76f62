"""The README's code blocks, run in order as one reader would, against a service of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from api.stack import Stack
from flowpp.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?P<skip><!-- not run by the tests: .+? -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]


@pytest.mark.timeout(900)
def test_the_blocks_run_twice_from_top_to_bottom_on_another_port(tmp_path: Path) -> None:
    reader = tmp_path / "reader"
    reader.mkdir()
    script = "set -euo pipefail\n" + "\n".join(as_shell(block) for block in BLOCKS if not block["skip"])
    with Stack(tmp_path / "data", port=0) as stack:
        assert stack.port != 8000
        for _ in range(2):
            run = subprocess.run(
                ["bash", "-c", script],
                cwd=reader,
                env={**os.environ, "FLOWPP_URL": stack.url, "PYTHONPATH": str(ROOT)},
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
            )
            assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
            assert '"bits_per_dim"' in run.stdout
            assert "/between/grid.png" in run.stdout
            assert "event: status" in run.stdout
    with Image.open(reader / "grid.png") as grid:
        assert grid.size == (4 * 32, 4 * 32), "16 samples of 32x32"
    shared = [RunDirectory(path) for path in (reader / "runs").glob("*/shared")]
    assert len(shared) == 2
    for each in shared:
        assert [row["step"] for row in each.read_metrics()] == [*range(1, 21)], "the steps of torch.distributed.run"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_no_example_is_for_one_port_or_has_a_key_that_is_used_up(document: Path) -> None:
    """Commands read FLOWPP_URL, which one line sets; `make serve` has the default port."""
    text = document.read_text()
    commands = [match["code"] for match in BLOCK.finditer(text)] + re.findall(r"`([^`]+)`", BLOCK.sub("", text))
    for line in "\n".join(commands).splitlines():
        if re.search(r"(127\.0\.0\.1|localhost):80\d\d", line):
            assert line.startswith(("make serve", "export FLOWPP_URL=")), line
        assert not re.search(r"\bClient\((?!\)|url)", line), line
        assert not re.search(r"Idempotency-Key: (?!\$)", line), line


def as_shell(block: dict[str, str]) -> str:
    """A block as shell commands, with this environment's commands in place of .venv's."""
    binaries = str(Path(sys.executable).parent)
    if block["language"] == "python":
        return f"{sys.executable} - <<'PYTHON'\n{block['code']}\nPYTHON"
    return block["code"].replace(".venv/bin/", f"{binaries}/")


def test_what_is_not_run_here_are_make_targets_that_exist() -> None:
    skipped = [block["code"] for block in BLOCKS if block["skip"]]
    targets = re.findall(r"^make (\w+)", "".join(skipped), re.MULTILINE)
    assert targets == ["demo", "test", "serve"]
    makefile = (ROOT / "Makefile").read_text()
    for target in targets:
        assert re.search(rf"^{target}:.*##", makefile, re.MULTILINE)


def test_every_block_is_of_a_language_that_is_run() -> None:
    assert {block["language"] for block in BLOCKS} == {"bash", "python"}
    assert len(BLOCKS) > 10
