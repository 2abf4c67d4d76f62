"""docs/webhooks.md, read by someone who does what it says."""

import os
import re
import subprocess
import sys
from pathlib import Path

from tests.api.conftest import Serve
from tests.api.test_webhooks import LOOPBACK, wait_for
from worker import child
from worker.redis_server import free_port
from worker.service import Service

BLOCK = re.compile(r"(?<!-->\n)```(\w+)\n(.*?)```", re.DOTALL)


def test_its_receiver_verifies_what_its_requests_ask_for(service: Service, serve: Serve, tmp_path: Path) -> None:
    settings = service.settings.model_copy(update={"webhook_networks": (LOOPBACK,)})
    port = free_port()
    with serve(settings) as http:
        text = (Path(__file__).parents[2] / "docs" / "webhooks.md").read_text()
        text = text.replace("http://127.0.0.1:8000", str(http.base_url).rstrip("/")).replace("9000", str(port))
        (_, create), (_, receiver), (_, ping) = BLOCK.findall(text)
        run(create, tmp_path)
        (tmp_path / "receiver.py").write_text(receiver)
        process = child.start([sys.executable, "receiver.py"], tmp_path / "log", dict(os.environ), tmp_path)
        try:
            wait_for(port)
            shown = run(ping, tmp_path)
        finally:
            child.stop(process)
    assert '"status":"delivered","attempts":1' in shown
    assert " ping {'webhook': 'wh_" in (tmp_path / "log").read_text()


def run(block: str, directory: Path) -> str:
    command = ["bash", "-c", f"set -euo pipefail\n{block}"]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, check=True).stdout
