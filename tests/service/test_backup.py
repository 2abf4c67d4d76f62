"""Backup and restore: a service on an empty machine that has what the lost one had, but what came after the backup."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import httpx
import numpy as np
import pytest

from api.stack import Stack
from tests.service.visitor import Visitor, flowpp, key, wait_until_recorded
from tests.waiting import PATIENCE_SECONDS, until

RESTORE = Path(__file__).parents[2] / "examples" / "restore.sh"
TINY = {"preset": "tiny"}


def restore(backup: Path, data: Path) -> subprocess.CompletedProcess[str]:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    command = ["bash", RESTORE, backup, data]
    return subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"PATH": path}, timeout=PATIENCE_SECONDS
    )


def test_a_backup_made_beside_the_service_is_restored_on_an_empty_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FLOWPP_AUTHENTICATION", "true")
    backup, restored = tmp_path / "backup", tmp_path / "restored"
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8, 3), np.uint8)
    with Stack(tmp_path / "data", port=0) as stack:
        visitor = Visitor(stack, token := key(stack.data, "alice", "submit"))
        dataset = visitor.dataset(images)
        trained = visitor.job("training", dataset=dataset["id"], model=TINY, training={"steps": 40})
        assert visitor.is_now(trained, "succeeded", "failed")["status"] == "succeeded"
        scored = visitor.job("likelihood", model=trained["id"], dataset=dataset["id"])
        visitor.is_now(scored, "succeeded", "failed")
        recipe = {"steps": 1_000_000, "checkpoint_every": 50}
        wait_until_recorded(stack.data)
        before = visitor.all_there_is()
        running = visitor.job("training", dataset=dataset["id"], model=TINY, training=recipe)
        visitor.has_checkpoint(running)
        wait_until_recorded(stack.data)
        made = flowpp("backup", backup, "--data", stack.data)  # while it trains
        assert made.returncode == 0, made.stderr
        after = visitor.job("likelihood", model=trained["id"], dataset=dataset["id"])
        visitor.http.close()
    shutil.rmtree(tmp_path / "data")

    done = restore(backup, restored)
    assert done.returncode == 0, done.stderr
    assert "1 keys, 0 webhooks, 1 datasets" in done.stdout
    with Stack(restored, port=0) as stack:
        visitor = Visitor(stack, token)
        found = visitor.all_there_is()
        alone = {place: answer for place, answer in before.items() if not of_all(place)}
        assert {place: found.get(place) for place in alone} == alone, "each object, with its files, events and figures"
        assert len(alone) > 20
        assert after["id"] not in str(found), "what came after the backup is lost"
        steps = visitor.http.get(f"/v1/jobs/{running['id']}/metrics").json()["columns"]["step"]
        visitor.is_now(running, "running")
        wait_for_steps_beyond(visitor.http, running["id"], len(steps))
        assert "goes on from step" in visitor.http.get(f"/v1/jobs/{running['id']}/logs").text
        visitor.http.close()

    again = restore(backup, restored)
    assert (again.returncode, "is there already" in again.stderr) == (2, True)


def of_all(place: str) -> bool:
    """Whether it is a list, which has the running job in it now."""
    return place.partition("?")[0].count("/") == 2


def wait_for_steps_beyond(http: httpx.Client, job: str, steps: int) -> None:
    """Returns when it has told more, each once."""

    def told_now() -> list[int]:
        return http.get(f"/v1/jobs/{job}/metrics").json()["columns"].get("step", [])

    told = until(lambda: found if len(found := told_now()) > steps else None)
    assert told == sorted(set(told)), "none twice; those between the backup of the job and of its checkpoint are lost"
