"""Names of uploaded files: any bytes, shown without loss; the content alone determines the kind of a file."""

import asyncio
import csv
import io
import os
import zipfile
from itertools import count
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from api.client import AsyncClient, Client, Job
from api.stack import Stack
from api.uploads import display_name
from flowpp.data import encode_png
from worker.models import Checkpoint
from worker.service import Service

FORM = {"Content-Type": "multipart/form-data; boundary=B"}
_seeds = count()


def png() -> bytes:
    """Another image each time."""
    return encode_png(np.random.default_rng(next(_seeds)).integers(0, 256, (32, 32, 3), np.uint8))


def npy() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.random.default_rng(next(_seeds)).integers(0, 256, (4, 32, 32, 3), np.uint8))
    return buffer.getvalue()


def form(*parts: tuple[bytes, bytes]) -> bytes:
    """A form of parts: the rest of the header after `form-data; `, and the content."""
    head = b"--B\r\nContent-Disposition: form-data; %s\r\n\r\n%s\r\n"
    return b"".join(head % each for each in parts) + b"--B--\r\n"


SENT = {
    b'filename="blob"': "blob",
    b'filename=""': "file",
    b"filename=a.png": "a.png",
    'filename="画像.png"'.encode(): "画像.png",
    b'filename="caf\xe9.png"': "caf\\udce9.png",
    'filename="café.png"'.encode(): "café.png",
    b"filename=\"\xe9\"; filename*=utf-8''%C3%A9.png": "é.png",
    b"filename*=UTF-8'en'%E7%94%BB%20x.png; filename=\"x.png\"": "画 x.png",
    b"filename*=utf-8''%E7%94%BB%E5%83%8F.png": "画像.png",
    b"filename*=iso-8859-1''caf%E9.png": "café.png",
    b"filename*=shift_jis''%89%E6": "\\udc89\\udce6",
    b"FILENAME*=utf-8''a.png": "a.png",
    b'filename="=?utf-8?B?44OH44O844K/LnBuZw==?="': "データ.png",
    b'filename="=?utf-8?Q?caf=C3=A9?="': "café",
    b'filename="=?iso-8859-1?q?caf=E9?="': "café",
    b'filename="=?utf-8?B?!?="': "=?utf-8?B?!?=",
    b'filename="=?utf-8?B?44OH?= x"': "=?utf-8?B?44OH?= x",
    b'filename="a%22b.png"': "a%22b.png",
    b'filename="a\\"b.png"': 'a"b.png',
    b"filename=\"a;filename*=utf-8''b\"": "a;filename*=utf-8''b",
    b'filename="a\tb\x1b[31m.png"': "a\\tb\\x1b[31m.png",
    'filename="a\u202egnp.exe"'.encode(): "a\\u202egnp.exe",
    'filename="\u05ea\u05de\u05d5\u05e0\u05d4.png"'.encode(): "\u05ea\u05de\u05d5\u05e0\u05d4.png",
    b'filename="C:\\photos\\a.png"': "a.png",
    b'filename="../../a.png"': "a.png",
    b'filename="/etc/passwd"': "etc/passwd",
    b'filename="cats/a.png"': "cats/a.png",
    b'filename=".hidden.png"': ".hidden.png",
    b'filename="' + b"x" * 1_000 + b'.png"': "x" * 30 + "...2c9a0e0ca5e8f2e1..." + "xxxxxxxx.png",
}


@pytest.mark.parametrize("sent", SENT, ids=lambda sent: ascii(sent[:40]))
def test_a_file_is_shown_by_the_name_that_was_sent(sent: bytes, lasting_http: httpx.Client) -> None:
    response = lasting_http.post("/v1/datasets", content=form((b'name="file"; ' + sent, png())), headers=FORM)
    assert response.status_code == 201, response.text
    name, wanted = response.json()["name"], SENT[sent]
    if len(wanted) > 50:  # a hash is in the middle
        assert (name[:33], name[-15:]) == (wanted[:33], wanted[-15:])
        assert len(name) < 100
    else:
        assert name == wanted


def test_names_that_differ_stay_different() -> None:
    names = [b"caf\xe9", "café".encode(), b"caf\\xe9", b"caf\\udce9", b"caf\xe8", b"caf%e9", b"caf_"]
    names += ["cafe\u0301".encode(), b"cafe"]
    names += [b"\x85", "\x85".encode(), b"a\nb", b"a\\nb", b"a_b", b"a/b", b"b/a", "\u202e".encode(), b"\\u202e"]
    names += [b"x" * 1_000, b"x" * 1_001, b"x" * 500 + b"y" + b"x" * 499, "画".encode() * 100, "画".encode() * 101]
    assert len({display_name(name) for name in names}) == len(names)


@given(st.lists(st.binary(min_size=1, max_size=12).filter(lambda name: b"/" not in name), min_size=2, max_size=2))
def test_any_two_names_stay_different_and_lead_nowhere(names: list[bytes]) -> None:
    shown = [display_name(name) for name in names]
    if not {b".", b"..", b"file"} & set(names):
        assert (shown[0] == shown[1]) == (names[0] == names[1])
    for each in shown:
        assert each.encode(), "it is Unicode"
        assert each not in ("", ".", "..")
        assert "\0" not in each
        assert "\n" not in each


PRINTED = st.characters(categories=("L", "M", "N", "P", "S", "Zs"), exclude_characters="\\/")


@given(st.text(PRINTED, min_size=1, max_size=40))
def test_what_can_be_printed_is_shown_as_it_is(name: str) -> None:
    if name not in (".", ".."):
        assert display_name(name.encode()) == name


@pytest.mark.parametrize("name", ["blob", "file", "", "a.png", "images.zip", "データ", "x.NPY", "a.npy.txt"])
def test_what_a_file_is_its_content_says(name: str, lasting_http: httpx.Client) -> None:
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("one", npy())
        file.writestr("two", npy())
    for content, images in ((npy(), 4), (archive.getvalue(), 8)):
        sent = form((f'name="file"; filename="{name}"'.encode(), content))
        response = lasting_http.post("/v1/datasets", content=sent, headers=FORM)
        assert (response.status_code, response.json().get("num_images")) == (201, images), response.text


def test_a_file_without_a_name_is_refused_as_what_it_is(http: httpx.Client, checkpoint: Checkpoint) -> None:
    for path, field in (("datasets", b"file"), ("likelihood-jobs", b"files"), ("checkpoints", b"file")):
        response = http.post(f"/v1/{path}", content=form((b'name="' + field + b'"', b"pixels")), headers=FORM)
        assert response.status_code == 422
        assert "filename" in response.json()["detail"]


def test_files_of_one_name_and_names_of_any_length_are_stored(http: httpx.Client) -> None:
    names = ["a.png", "a.png", "画" * 300, "画" * 300 + ".png"]
    files = [("file", (name, png())) for name in names]
    response = http.post("/v1/datasets", files=files)
    assert response.status_code == 201, response.text
    assert response.json()["num_images"] == 4


def test_files_called_by_paths_are_a_folder_with_its_split(http: httpx.Client) -> None:
    names = ["cats/train/a.png", "cats/train/b.png", "cats/validation/a.png", "cats/validation/b.png"]
    response = http.post("/v1/datasets", files=[("file", (name, png())) for name in names])
    assert (response.status_code, response.json()["num_validation"]) == (201, 2), response.text
    for odd in (["a/x.png", "a/x.png"], ["b/x", "b/x/y.png"], ["c/x/y.png", "c/x"], ["d/x", "d/x/y/z/w.png"]):
        response = http.post("/v1/datasets", files=[("file", (name, png())) for name in odd])
        assert (response.status_code, response.json()["num_images"]) == (201, 2), odd
    deep = [
        ("file", ("/".join([part] * count) + "/a.png", png()))
        for part, count in (("画" * 80, 15), ("d", 17), ("e", 500))
    ]
    response = http.post("/v1/datasets", files=deep)
    assert response.status_code == 201, response.text


def test_refusals_name_files_as_they_are_shown(http: httpx.Client, checkpoint: Checkpoint) -> None:
    sent = form(
        (b'name="model"', checkpoint.id.encode()),
        ('name="files"; filename="画像.png"'.encode(), png()),
        ('name="files"; filename="猫/写真.png"'.encode(), b"text"),
    )
    response = http.post("/v1/likelihood-jobs", content=sent, headers=FORM)
    assert response.status_code == 422
    assert response.json()["detail"].startswith("猫/写真.png: ")


NAMES = [
    "画像.png",
    "写真.png",
    'a,b"c".png',
    "$x^{$.png",
    "=1+1.png",
    "a/x.png",
    "b/x.png",
    "😀.png",
    "same.png",
    "same.png",
]


def test_results_tell_images_apart_by_their_names(stack: Stack, client: Client, trained: Job, tmp_path: Path) -> None:
    images = [(name, png()) for name in NAMES]
    job = client.likelihood_jobs.create(model=trained.id, images=images, bits_map=True, latents=True, wait=60)
    job = client.jobs.wait(job.id, timeout=120)
    assert job.status == "succeeded", job.error
    assert job.result is not None
    shown = [name.replace('"', "%22") for name in NAMES]  # as every browser and HTTP library writes a quote
    assert [image["name"] for image in job.result["images"]] == shown
    table = client.jobs.download(job.id, "likelihood.csv", tmp_path / "likelihood.csv")
    with table.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == shown
    assert len({row["bits_per_dim"] for row in rows}) == len(rows), "in the order sent: also files of one name"
    for artifact in ("bits_map.npz", "latents.npz"):
        with np.load(client.jobs.download(job.id, artifact, tmp_path / artifact)) as arrays:
            assert arrays["names"].tolist() == shown
    assert {artifact.name for artifact in client.jobs.artifacts(job.id)} >= {"bits_map.png", "likelihood.png"}


def odd_folder(directory: Path) -> Path:
    """A folder with names that are not UTF-8, and a file from before the first time that a zip can store."""
    folder = os.fsencode(directory) + b"/old \xe9\xff"
    os.makedirs(folder + b"/in\xe9")
    for name in (b"/caf\xe9.png", b"/caf\xe8.png", b"/in\xe9/a\nb.png", b'/"quoted".png', b"/" + b"x" * 250 + b".png"):
        Path(os.fsdecode(folder + name)).write_bytes(png())
    os.utime(folder + b"/caf\xe9.png", (0, 0))
    return Path(os.fsdecode(folder))


def test_the_client_sends_files_of_any_name(
    http: httpx.Client, tmp_path: Path, checkpoint: Checkpoint, service: Service
) -> None:
    folder = odd_folder(tmp_path)
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    with Client(str(http.base_url)) as client:
        dataset = client.datasets.upload(folder)
        assert (dataset.num_images, dataset.name) == (5, "old %E9%FF.zip")
        assert [client.datasets.upload(path).num_images for path in paths] == [1] * 5
        job = client.likelihood_jobs.create(model=checkpoint.id, images=[*paths, ("a\udcff.png", png())])
        assert job.status == "queued"

    async def upload() -> None:
        async with AsyncClient(str(http.base_url)) as client:
            assert (await client.datasets.upload(folder)).num_images == 5
            assert (await client.likelihood_jobs.create(model=checkpoint.id, images=paths)).status == "queued"

    asyncio.run(upload())


def test_the_client_sends_a_stream_under_any_name(http: httpx.Client, tmp_path: Path) -> None:
    """A file that reports its progress is read in pieces."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff.npy"))
    path.write_bytes(npy())
    seen: list[tuple[int, int]] = []
    with Client(str(http.base_url)) as client:
        dataset = client.datasets.upload(path, lambda done, total: seen.append((done, total)))
    assert dataset.name == "%FF.npy"
    assert seen[-1] == (path.stat().st_size, path.stat().st_size)
