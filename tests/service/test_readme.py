"""The README's code blocks, run in order as one reader would, against a service of their own."""

import os
import re
import subprocess
import sys
from pathlib import Path

from PIL import Image

from api.stack import Stack
from flowpp.run_directory import RunDirectory

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCK = re.compile(r"(?P<skip><!-- not run by the tests: .+? -->\n)?```(?P<language>\w+)\n(?P<code>.*?)```", re.DOTALL)
BLOCKS = [match.groupdict() for match in BLOCK.finditer(README)]


def test_the_blocks_run_from_top_to_bottom(tmp_path: Path) -> None:
    (tmp_path / "reader").mkdir()
    with Stack(tmp_path / "data", port=0) as stack:
        script = "set -euo pipefail\n" + "\n".join(as_shell(block) for block in BLOCKS if not block["skip"])
        script = script.replace("http://127.0.0.1:8000", stack.url)
        environment = {**os.environ, "FLOWPP_URL": stack.url, "PYTHONPATH": str(ROOT)}
        run = subprocess.run(
            ["bash", "-c", script],
            cwd=tmp_path / "reader",
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
    assert run.returncode == 0, f"{run.stdout}\n{run.stderr}"
    with Image.open(tmp_path / "reader" / "grid.png") as grid:
        assert grid.size == (4 * 32, 4 * 32), "16 samples of 32x32"
    assert '"bits_per_dim"' in run.stdout
    assert "event: status" in run.stdout
    assert "between/grid.png" in run.stdout
    shared = RunDirectory(tmp_path / "reader" / "shared")
    assert [row["step"] for row in shared.read_metrics()] == list(range(1, 21)), "what torch.distributed.run trained"


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
