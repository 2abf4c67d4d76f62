"""The asynchronous client against a running service: what it shares with the blocking one is one implementation."""

import asyncio
import inspect
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from api.client import AsyncClient, Client, Job, ProblemError, Unreachable
from api.stack import Stack
from flowpp.data import encode_png
from tests.waiting import PATIENCE_SECONDS


def test_the_whole_way_awaited(stack: Stack, trained: Job, images: np.ndarray, tmp_path: Path) -> None:
    archive = tmp_path / "own.npy"
    np.save(archive, images[:6])  # no other test has a dataset of these, which is deleted at the end

    async def go() -> None:
        async with AsyncClient(stack.url) as client:
            reports: list[tuple[int, int]] = []
            dataset = await client.datasets.upload(archive, lambda sent, total: reports.append((sent, total)))
            assert reports[-1] == (archive.stat().st_size,) * 2
            events = [event async for event in client.jobs.events(trained.id)]
            assert events[-1].terminal
            assert trained.id in {job.id async for job in client.jobs.list(type="training")}
            scores = await asyncio.gather(
                *(
                    client.likelihood_jobs.create(
                        model=trained.id, images=[("a.png", encode_png(image))], metadata={"n": str(n)}, wait=60
                    )
                    for n, image in enumerate(images[:4])
                )
            )
            assert [score.status for score in scores] == ["succeeded"] * 4
            assert [score.metadata for score in scores] == [{"n": str(n)} for n in range(4)]
            samples = await client.sampling_jobs.create(model=trained.id, num_samples=2)
            assert (await client.jobs.wait(samples.id, timeout=PATIENCE_SECONDS)).status == "succeeded"
            grid = await client.jobs.download(samples.id, "grid.png", tmp_path / "grid.png")
            assert grid.read_bytes().startswith(b"\x89PNG")
            await client.datasets.delete(dataset.id)
            with pytest.raises(ProblemError, match=dataset.id):
                await client.datasets.get(dataset.id)

    asyncio.run(go())


def test_waiting_for_one_job_keeps_nobody_else_waiting(stack: Stack, trained: Job) -> None:
    async def go() -> None:
        async with AsyncClient(stack.url) as client:
            dataset = trained.request["dataset"]
            job = await client.training_jobs.create(
                dataset=dataset, model={"preset": "tiny"}, training={"steps": 100_000}
            )
            waiting = asyncio.create_task(client.jobs.wait(job.id))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            await client.jobs.cancel(job.id)
            assert (await waiting).status == "cancelled"

    asyncio.run(go())


def test_the_blocking_client_works_inside_of_an_event_loop_as_in_notebooks(stack: Stack, trained: Job) -> None:
    async def cell() -> None:
        with Client(stack.url) as client:
            assert client.jobs.get(trained.id) == trained.model_copy(update={"queue_position": None})
            assert next(iter(client.jobs.list(type="training"))).type == "training"
            assert len(list(client.jobs.events(trained.id))) > 3

    asyncio.run(cell())


def test_both_clients_have_the_same_calls_with_the_same_parameters_and_words() -> None:
    with Client("http://127.0.0.1:1") as blocking:
        awaited = AsyncClient("http://127.0.0.1:1")
        resources = [name for name in vars(blocking) if not name.startswith("_") and name != "way"]
        assert set(resources) >= {"datasets", "jobs", "checkpoints", "presets", "training_jobs"}
        for name in resources:
            one, other = getattr(blocking, name), getattr(awaited, name)
            assert type(one) is type(other)
            for call in [call for call in dir(type(one)) if not call.startswith("_") and call != "way"]:
                assert inspect.signature(getattr(one, call)) == inspect.signature(getattr(other, call))
                assert getattr(one, call).__name__ == call
        assert "Raises `TimeoutError`" in (blocking.jobs.wait.__doc__ or "")
        asyncio.run(awaited.aclose())


def test_a_type_checker_knows_what_each_call_of_both_answers_and_takes() -> None:
    file = Path(__file__).parent / "typed_client.py"
    command = [sys.executable, "-m", "mypy", "--strict", "--warn-unused-ignores", str(file)]
    checked = subprocess.run(command, capture_output=True, text=True, check=False, cwd=file.parents[2])
    assert checked.returncode == 0, checked.stdout


def test_no_service_is_unreachable_when_awaited() -> None:
    async def go() -> None:
        async with AsyncClient("http://127.0.0.1:9", max_retries=0) as client:
            await client.jobs.get("job_x")

    with pytest.raises(Unreachable):
        asyncio.run(go())
