"""`flowpp keys`, `reindex` and `gc`, beside a running stack, a resting one, and with the environment's Redis server."""

import json
import os
import subprocess
import sys
from pathlib import Path

import httpx
import pytest

from api.stack import Stack
from worker.redis_server import RedisServer


def flowpp(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).with_name("flowpp")), *map(str, arguments)]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def test_a_key_is_made_listed_and_revoked_beside_a_running_stack(stack: Stack) -> None:
    made = flowpp("keys", "create", "--owner", "alice", "--scope", "read", "--data", stack.data, "--json")
    assert made.returncode == 0, made.stderr
    key = json.loads(made.stdout)
    assert (key["owner"], key["scopes"]) == ("alice", ["read"])
    assert key["token"].startswith("flowpp_")
    listed = flowpp("keys", "list", "--data", stack.data)
    assert key["id"] in listed.stdout
    assert key["token"] not in listed.stdout
    revoked = flowpp("keys", "revoke", key["id"], "--data", stack.data, "--json")
    assert json.loads(revoked.stdout) == {"id": key["id"], "revoked": True}
    assert key["id"] not in flowpp("keys", "list", "--json", "--data", stack.data).stdout
    again = flowpp("keys", "revoke", key["id"], "--data", stack.data)
    assert again.returncode == 2
    assert f"there is no key {key['id']}" in again.stderr


def test_a_key_made_while_the_stack_rests_opens_it_when_it_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with RedisServer(tmp_path / "redis"):
        pass
    (tmp_path / "logs").mkdir()
    made = flowpp("keys", "create", "--owner", "alice", "--data", tmp_path)
    assert made.returncode == 0, made.stderr
    monkeypatch.setenv("FLOWPP_AUTHENTICATION", "true")
    with Stack(tmp_path, port=0) as stack, httpx.Client(base_url=stack.url, trust_env=False) as client:
        assert client.get("/v1/jobs").status_code == 401
        answer = client.get("/v1/jobs", headers={"Authorization": f"Bearer {made.stdout.strip()}"})
        assert answer.status_code == 200
        assert "ratelimit" in answer.headers
        log = (stack.logs / "api.log").read_text()
    assert made.stdout.strip().split("_", 2)[2] not in log


def test_a_key_is_made_in_the_redis_server_of_the_environment(redis_server: RedisServer, tmp_path: Path) -> None:
    there = {"FLOWPP_REDIS_URL": redis_server.url, "FLOWPP_DATA_DIRECTORY": str(tmp_path)}
    assert flowpp("keys", "create", "--owner", "alice", **there).returncode == 0
    assert "alice" in flowpp("keys", "list", **there).stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--owner", "Alice Smith"], "--owner: 'Alice Smith' is no owner's name; write up to 64 lower case letters"),
        (["--owner", "alice", "--scope", "write"], "--scope: 'write' is unknown; there are read, submit, admin"),
        (["--owner", "alice"], "is no data directory"),
    ],
)
def test_what_is_wrong_is_said(arguments: list[str], said: str, tmp_path: Path) -> None:
    run = flowpp("keys", "create", *arguments, "--data", tmp_path / "none")
    assert run.returncode in (1, 2)
    assert said in " ".join(run.stderr.split())


def test_garbage_is_collected_but_not_from_a_store_of_which_redis_knows_nothing(tmp_path: Path) -> None:
    with RedisServer(tmp_path / "redis") as server:
        there = {"FLOWPP_REDIS_URL": server.url, "FLOWPP_DATA_DIRECTORY": str(tmp_path)}
        assert flowpp("keys", "create", "--owner", "alice", **there).returncode == 0
        left = tmp_path / "store" / "datasets" / "ds_left" / "images.npy"
        left.parent.mkdir(parents=True)
        left.write_bytes(bytes(1000))
        assert json.loads(flowpp("gc", "--json", **there).stdout) == {"bytes": 0, "dry_run": False, "garbage": []}
        os.utime(left, (0, 0))
        garbage = [{"name": "datasets/ds_left", "bytes": 1000}]
        would = flowpp("gc", "--json", "--dry-run", **there)
        assert json.loads(would.stdout) == {"bytes": 1000, "dry_run": True, "garbage": garbage}
        collected = flowpp("gc", **there)
        assert (collected.stdout, collected.stderr) == ("datasets/ds_left  1,000\n", "1,000 bytes were freed\n")
        assert not left.parent.exists()
    with RedisServer(tmp_path / "another") as server:
        there["FLOWPP_REDIS_URL"] = server.url
        refused = flowpp("gc", **there)
        assert refused.returncode == 2
        assert "flowpp reindex" in refused.stderr
        rebuilt = flowpp("reindex", **there)
        assert (rebuilt.returncode, rebuilt.stdout) == (0, "1 keys, 0 webhooks, 0 datasets, 0 checkpoints, 0 jobs\n")
        again = flowpp("reindex", **there)
        assert again.returncode == 2
        assert "Redis has records" in again.stderr
        assert flowpp("gc", **there).returncode == 0
        assert "alice" in flowpp("keys", "list", **there).stdout
