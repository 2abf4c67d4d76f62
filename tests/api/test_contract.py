"""The API does what its OpenAPI says, and refuses what it does not: schemathesis asks, and finds nothing."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.served import Served, serving
from worker.redis_server import RedisServer


@pytest.fixture
def served(redis_server: RedisServer, saved_model: Path, tmp_path: Path) -> Iterator[Served]:
    with serving(redis_server, saved_model, tmp_path) as served:
        yield served


def check(served: Served, max_examples: int) -> None:
    """All checks of schemathesis, in all its phases, over each operation that the OpenAPI has; the same each time."""
    command = [
        *(str(Path(sys.executable).with_name("schemathesis")), "run", f"{served.url}/openapi.json", "--no-color"),
        *("--header", f"Authorization: Bearer {served.token}", "--checks", "all", "--suppress-health-check", "all"),
        *("--max-examples", str(max_examples), "--generation-deterministic", "--continue-on-failure"),
        *("--request-timeout", "20"),
    ]
    environment = {
        **os.environ,
        "SCHEMATHESIS_HOOKS": "tests.api.contract_hooks",
        "FLOWPP_CONTRACT_IDS": json.dumps(served.ids),
        "NO_PROXY": "*",
    }
    found = subprocess.run(
        command, env=environment, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=1_500
    )
    assert found.returncode == 0, found.stdout[-20_000:] + found.stderr[-5_000:]
    log = served.log.read_text()
    assert "Traceback" not in log
    for answered in ('/v1/training-jobs HTTP/1.1" 202', '/artifacts/page.html HTTP/1.1" 200', 'HTTP/1.1" 204'):
        assert answered in log, "nothing was there to be found"


def test_schemathesis_finds_nothing_at_first_sight(served: Served) -> None:
    check(served, max_examples=10)


@pytest.mark.contract
@pytest.mark.timeout(1_600)
def test_schemathesis_finds_nothing(served: Served) -> None:
    check(served, max_examples=300)
