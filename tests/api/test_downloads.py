"""Downloads: whole or not at all, and taken up where they broke."""

import hashlib
import zipfile
from pathlib import Path

import numpy as np
import pytest

from api.client import Client, DamagedDownload, Job, ProblemError, Unreachable
from api.client.files import unpack
from api.stack import Stack
from flowpp import FlowPP
from tests.api.busy_server import Reply, busy_server
from tests.api.cutting_proxy import cutting_proxy

CONTENT = bytes(range(256)) * 1000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def test_a_checkpoint_is_fetched_as_a_directory_that_the_library_loads(
    client: Client, trained: Job, images: np.ndarray, tmp_path: Path
) -> None:
    checkpoint = next(iter(client.checkpoints.list(job=trained.id)))
    assert (checkpoint.job, checkpoint.step) == (trained.id, 20)
    directory = client.checkpoints.fetch(checkpoint.id, tmp_path / "deep" / "model")
    assert FlowPP.load(directory).config.filters == checkpoint.model["filters"]
    assert [path.name for path in directory.parent.iterdir()] == ["model"], "nothing is left beside it"
    with pytest.raises(FileExistsError, match="exists already"):
        client.checkpoints.fetch(checkpoint.id, directory)


def test_a_download_that_breaks_goes_on_where_it_broke(
    stack: Stack, client: Client, trained: Job, tmp_path: Path
) -> None:
    checkpoint = next(iter(client.checkpoints.list(job=trained.id)))
    whole = client.checkpoints.download(checkpoint.id, tmp_path / "whole.zip").read_bytes()
    reports: list[tuple[int, int]] = []
    with (
        cutting_proxy(stack.port, bytes_each=len(whole) // 5) as (port, connections),
        Client(f"http://127.0.0.1:{port}") as through,
    ):
        path = through.checkpoints.download(
            checkpoint.id, tmp_path / "cut.zip", lambda sent, total: reports.append((sent, total))
        )
    assert path.read_bytes() == whole
    assert len(connections) == 4, "the proxy cuts the first three"
    assert [sent for sent, _ in reports] == sorted({sent for sent, _ in reports}), "no byte came twice"
    assert {total for _, total in reports} == {len(whole)}


def test_a_later_call_takes_up_what_a_killed_one_has_left(
    stack: Stack, client: Client, trained: Job, tmp_path: Path
) -> None:
    checkpoint = next(iter(client.checkpoints.list(job=trained.id)))
    whole = client.checkpoints.download(checkpoint.id, tmp_path / "whole.zip").read_bytes()
    with (
        cutting_proxy(stack.port, bytes_each=len(whole) // 2) as (port, _),
        Client(f"http://127.0.0.1:{port}", max_retries=0) as through,
        pytest.raises(Unreachable),
    ):
        through.checkpoints.download(checkpoint.id, tmp_path / "cut.zip")
    (partial,) = tmp_path.glob("cut.zip.*.partial")
    left = partial.stat().st_size
    assert 0 < left < len(whole)
    sent: list[int] = []
    client.checkpoints.download(checkpoint.id, tmp_path / "cut.zip", lambda done, _: sent.append(done))
    assert sent[0] > left, "it began behind what was there"
    assert (tmp_path / "cut.zip").read_bytes() == whole
    assert not partial.exists()


def test_what_was_left_of_another_file_is_not_taken_for_a_part_of_this_one(
    client: Client, trained: Job, tmp_path: Path
) -> None:
    for tag in ("0" * 64, "ckpt_other"):
        (tmp_path / f"curve.png.{tag}.partial").write_bytes(b"of another file")
    client.jobs.download(trained.id, "training_curve.png", tmp_path / "curve.png")
    (artifact,) = [each for each in client.jobs.artifacts(trained.id) if each.name == "training_curve.png"]
    assert hashlib.sha256((tmp_path / "curve.png").read_bytes()).hexdigest() == artifact.sha256
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_more_than_the_file_has_is_thrown_away(client: Client, trained: Job, tmp_path: Path) -> None:
    (artifact,) = [each for each in client.jobs.artifacts(trained.id) if each.name == "training_curve.png"]
    (tmp_path / f"curve.png.{artifact.sha256}.partial").write_bytes(b"x" * (artifact.bytes + 1))
    path = client.jobs.download(trained.id, "training_curve.png", tmp_path / "curve.png")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == artifact.sha256


def test_what_is_not_the_file_of_its_sha256_is_not_kept(tmp_path: Path) -> None:
    wrong = Reply(200, CONTENT[:-1] + b"?", {"ETag": f'"{SHA256}"'})
    with busy_server(wrong) as (url, _), Client(url) as client, pytest.raises(DamagedDownload, match=SHA256):
        client.jobs.download("job_1", "grid.png", tmp_path / "grid.png")
    assert not any(tmp_path.iterdir())


HALF = len(CONTENT) // 2
BROKEN = Reply(
    200,
    CONTENT[:HALF],
    {"ETag": f'"{SHA256}"', "Content-Length": str(len(CONTENT)), "Connection": "close"},
)


def test_the_rest_is_asked_for_by_range_if_it_is_still_the_same_file(tmp_path: Path) -> None:
    rest = Reply(206, CONTENT[HALF:], {"Content-Range": f"bytes {HALF}-{len(CONTENT) - 1}/{len(CONTENT)}"})
    with busy_server(BROKEN, rest) as (url, sent), Client(url) as client:
        path = client.jobs.download("job_1", "png/0000.png", tmp_path / "image.png")
    assert path.read_bytes() == CONTENT
    assert [request.path for request in sent] == ["/v1/jobs/job_1/artifacts/png/0000.png"] * 2
    assert (sent[1].headers["range"], sent[1].headers["if-range"]) == (f"bytes={HALF}-", f'"{SHA256}"')


def test_another_part_than_the_one_asked_for_is_not_put_behind_the_first(tmp_path: Path) -> None:
    other = Reply(206, CONTENT[:10], {"Content-Range": f"bytes 0-9/{len(CONTENT)}"})
    with busy_server(BROKEN, other) as (url, _), Client(url) as client, pytest.raises(DamagedDownload, match="0-9"):
        client.jobs.download("job_1", "grid.png", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_a_refused_download_leaves_no_file(client: Client, trained: Job, tmp_path: Path) -> None:
    with pytest.raises(ProblemError):
        client.jobs.download(trained.id, "no-such-artifact", tmp_path / "file")
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["../../evil", "/evil", "ckpt_1/../evil", "ckpt_1/.hidden", "ckpt_1/a/b", "alone"])
def test_an_archive_leads_nowhere_but_into_its_directory(name: str, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("ckpt_1/manifest.json", "{}")
        archive.writestr(name, "evil")
    before = sorted(tmp_path.parent.rglob("*"))
    with pytest.raises(DamagedDownload, match="does not belong"):
        unpack(tmp_path / "evil.zip", tmp_path / "model")
    assert sorted(tmp_path.parent.rglob("*")) == before


def test_a_compressed_archive_that_could_grow_beyond_measure_is_refused(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ckpt_1/manifest.json", b"\0" * 10_000_000)
    with pytest.raises(DamagedDownload, match="does not belong"):
        unpack(tmp_path / "bomb.zip", tmp_path / "model")
