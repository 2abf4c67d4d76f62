"""docs/webhooks.md, read by someone who does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.api.conftest import Serve
from tests.api.test_webhooks import LOOPBACK, wait_for
from worker import child
from worker.redis_server import free_port
from worker.service import Service

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"(?<!-->\n)```(\w+)\n(.*?)```", re.DOTALL)
WAYS = ("curl", "flowpp", "Client")
"""In which a webhook is made, and pinged."""


@pytest.mark.parametrize("way", range(3), ids=WAYS)
def test_its_receiver_verifies_what_its_requests_ask_for(
    way: int, service: Service, serve: Serve, tmp_path: Path
) -> None:
    settings = service.settings.model_copy(update={"webhook_networks": (LOOPBACK,)})
    port = free_port()
    with serve(settings) as http:
        url = str(http.base_url).rstrip("/")
        text = (ROOT / "docs" / "webhooks.md").read_text()
        text = text.replace("9000", str(port))
        blocks = BLOCK.findall(text)
        creates, (_, receiver), pings = blocks[:3], blocks[3], blocks[4:]
        assert [WAYS[way] in block for _, block in creates + pings] == [each == way for each in range(3)] * 2
        run(*creates[way], url, tmp_path)
        (tmp_path / "receiver.py").write_text(receiver)
        process = child.start([sys.executable, "receiver.py"], tmp_path / "log", dict(os.environ), tmp_path)
        try:
            wait_for(port)
            shown = run(*pings[way], url, tmp_path)
        finally:
            child.stop(process)
    assert re.search("ping.*delivered.*204", shown), shown
    assert " ping {'webhook': 'wh_" in (tmp_path / "log").read_text()


def run(language: str, block: str, url: str, directory: Path) -> str:
    """A block's output, with this environment's commands in place of .venv's."""
    script = block.replace(".venv/bin/", f"{Path(sys.executable).parent}/")
    command = [sys.executable, "-c", script] if language == "python" else ["bash", "-c", f"set -euo pipefail\n{script}"]
    own = {**os.environ, "FLOWPP_URL": url, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=directory, env=own, capture_output=True, text=True, check=True).stdout
