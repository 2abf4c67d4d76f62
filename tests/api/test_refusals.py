"""Refusals of the service on the command line, and the checks of the command before it sends anything."""

import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import get_args

import httpx
import numpy as np
import pytest

from api.client import ProblemError
from api.commands.ids import KINDS
from api.commands.options import EVENTS, STATUSES, TYPES
from api.commands.refusals import in_words, option_of
from api.stack import Stack
from flowpp.data import encode_png
from tests.api.busy_server import DATASET, JOB, Reply, busy_server
from tests.api.conftest import Serve
from tests.api.test_cli import flowpp, printed
from worker.jobs import JobStatus, JobType
from worker.keys import NewKey, Scope
from worker.service import Service
from worker.webhooks import EVENTS as WEBHOOK_EVENTS

URL = "http://127.0.0.1:8123"


def said(code: str, detail: str, *paths: str, status: int = 422, key: str = "") -> str:
    return in_words(ProblemError(status, code, detail, [{"path": path, "detail": detail} for path in paths]), URL, key)


@pytest.mark.parametrize(
    ("path", "option"),
    [
        ("training.batch_size", "--set training.batch_size=..."),
        ("model.dequantizer.blocks", "--set model.dequantizer.blocks=..."),
        ("training.milestones.0.step", "--set training.milestones=..."),
        ("model.flow.3", "--set model.flow=..."),
        ("model.preset", "--preset"),
        ("training.steps", "--steps"),
        ("training", ""),
        ("resume_from", "--resume-from"),
        ("metadata.who", "--metadata"),
        ("metadata[who]", "--metadata"),
        ("events.0", "--event"),
        ("Cancel-After", "--cancel-after"),
        ("num_samples", "--num-samples"),
        ("body", ""),
        ("something_new", "something_new"),
    ],
)
def test_each_field_is_named_by_its_option(path: str, option: str) -> None:
    assert option_of(path) == option


def test_sentences_of_the_service_name_options_instead_of_headers_and_fields() -> None:
    refused = said("invalid_request", "Cancel-After: give a number of seconds", "Cancel-After")
    assert refused == "--cancel-after: give a number of seconds (invalid_request)"
    memory = "training.micro_batch_size 1,024 would fit; leave training.memory_gib open"
    refused = said("out_of_memory", memory, "training.micro_batch_size")
    assert "--set training.micro_batch_size=1024 would fit; leave --set training.memory_gib=... open" in refused
    assert refused.startswith("--set training.micro_batch_size=...: ")
    assert said("scope_missing", "this key lacks the scope 'submit', which POST needs", status=403) == (
        "this key lacks the scope 'submit'; `flowpp keys create --scope`, on the service's machine, makes one that has "
        "it (scope_missing)"
    )
    under_way = said("idempotency_in_progress", "a request with this Idempotency-Key is under way", status=409)
    assert "Idempotency-Key" not in under_way
    for key, words in (("", "needs a key: give it by --key or FLOWPP_API_KEY"), ("k", "does not accept this key")):
        unknown = said("unauthenticated", "send a key as 'Authorization: Bearer flowpp_...'", status=401, key=key)
        assert words in unknown
        assert "--key" in unknown
        assert "Authorization" not in unknown


def test_a_refusal_says_all_of_its_faults_once() -> None:
    faults = [{"path": "num_samples", "detail": "too many"}, {"path": "seed", "detail": "too low"}]
    error = ProblemError(422, "invalid_request", "num_samples: too many", faults)
    assert in_words(error, URL, "") == "--num-samples: too many (invalid_request)\n  --seed: too low"


def test_what_is_no_service_of_ours_is_named_without_its_page() -> None:
    page = Reply(502, b"<html><body><h1>Bad\nGateway</h1></body></html>", {"Content-Type": "text/html"})
    for reply, words in ((page, "answers 502 Bad Gateway"), (Reply(404, b"no route"), "answers 404 no route")):
        with busy_server(reply) as (url, _):
            shown = flowpp("jobs", "show", "job_1", "--url", url)
        assert words in shown.stderr
        assert "is --url (FLOWPP_URL) a flowpp service?" in shown.stderr
        assert "<" not in shown.stderr
        assert shown.stderr.count("\n") == 1


def test_a_path_behind_the_address_is_named(stack: Stack) -> None:
    for path in ("/v1", "/docs/"):
        shown = flowpp("jobs", "list", "--url", stack.url + path)
        assert (shown.returncode, "the service's address alone" in shown.stderr) == (2, True), shown.stderr
    assert flowpp("jobs", "list", "--url", f"{stack.url}/").returncode == 0
    shown = flowpp("jobs", "list", "--url", stack.url.replace("http", "https"))
    assert (shown.returncode, f"not by https; try {stack.url}" in shown.stderr) == (3, True), shown.stderr


@pytest.fixture
def guarded(service: Service, serve: Serve) -> Iterator[tuple[str, dict[Scope, str]]]:
    """The url of a service that needs keys, and a key of each scope."""
    keys = {scope: service.keys.create(NewKey(owner="alice", scopes=(scope,)))[1] for scope in get_args(Scope)}
    with serve(service.settings.model_copy(update={"authentication": True})) as client:
        yield str(client.base_url).rstrip("/"), keys


def test_a_key_that_is_missing_unknown_or_of_too_small_a_scope_is_refused_before_an_upload(
    guarded: tuple[str, dict[Scope, str]], archive: Path
) -> None:
    url, keys = guarded
    train = ("train", archive, "--preset", "tiny", "--detach", "--url", url)
    without = flowpp(*train, FLOWPP_API_KEY="")
    assert (without.returncode, "give it by --key or FLOWPP_API_KEY" in without.stderr) == (2, True), without.stderr
    unknown = flowpp(*train, "--key", "flowpp_no_such")
    assert (unknown.returncode, "does not accept this key" in unknown.stderr) == (2, True), unknown.stderr
    reading = flowpp(*train, "--key", keys["read"])
    assert (reading.returncode, "has the scope read only" in reading.stderr) == (2, True), reading.stderr
    for refused in (without, unknown, reading):
        assert "uploaded" not in refused.stderr
        assert "Authorization" not in refused.stderr
    assert flowpp("datasets", "list", "--url", url, FLOWPP_API_KEY=keys["admin"]).stdout == ""
    deleted = flowpp("jobs", "cancel", "job_1", "--key", keys["read"], "--url", url)
    assert "this key lacks the scope 'submit'; `flowpp keys create" in deleted.stderr
    status = httpx.get(f"{url}/v1/status", headers={"Authorization": f"Bearer {keys['read']}"}, trust_env=False).json()
    assert (status["owner"], status["scopes"]) == ("alice", ["read"])
    done = flowpp(*train, "--key", keys["submit"])
    assert done.stdout.startswith("job_"), done.stderr


COMMANDS = {
    "job": (
        *(("jobs", verb) for verb in ("show", "watch", "cancel", "pause", "resume", "logs", "attempts", "artifacts")),
        *(("jobs", "download"), ("jobs", "delete"), ("checkpoints", "list", "--job")),
    ),
    "dataset": (
        *(("datasets", "show"), ("datasets", "delete"), ("datasets", "contact-sheet"), ("train",)),
        ("likelihood", "job_1", "--dataset"),
    ),
    "checkpoint": (("checkpoints", "show"), ("checkpoints", "download"), ("checkpoints", "delete")),
    "webhook": (("webhooks", "show"), ("webhooks", "delete"), ("webhooks", "ping"), ("webhooks", "deliveries")),
    "model": (("sample",), ("likelihood",), ("train", "ds_1", "--resume-from")),
}


def test_an_id_of_another_kind_is_answered_with_its_kind_and_command_and_nothing_is_sent() -> None:
    shown = {"job": "jobs show {}", "dataset": "datasets show {}", "checkpoint": "checkpoints show {}"}
    with busy_server(Reply()) as (url, sent):
        for index, (kind, commands) in enumerate(COMMANDS.items()):
            for command in commands:
                wrong = [other for other in shown if other != kind and not (kind == "model" and other != "dataset")]
                other = wrong[index % len(wrong)]
                text = f"{KINDS[other]}1"
                refused = flowpp(*command, text, "--url", url, COLUMNS="1000")
                assert refused.returncode == 2
                assert f"{text} is a {other}: `flowpp {shown[other].format(text)}`" in refused.stderr, command
        for text in ("nonsense", "wh_1", "key_1", "dlv_1", "", "JOB_1"):
            refused = flowpp("jobs", "show", text, "--url", url, COLUMNS="1000")
            assert (refused.returncode, "This needs a job's id (job_...)" in refused.stderr) == (2, True)
    assert not sent


def test_a_model_that_is_a_directory_here_leads_to_the_other_command(tmp_path: Path) -> None:
    refused = flowpp("sample", tmp_path, COLUMNS="1000")
    assert (refused.returncode, "`python -m flowpp` reads files of this machine" in refused.stderr) == (2, True)


def test_unknown_names_are_answered_with_the_nearest_and_nothing_is_sent() -> None:
    with busy_server(Reply()) as (url, sent):
        for arguments, near in {
            ("train", "ds_1", "--preset", "smal"): "did you mean small?",
            ("train", "ds_1", "--preset", "cifar-10"): "did you mean cifar10?",
            ("train", "ds_1", "--set", "training.learnign_rate=1"): "did you mean learning_rate?",
            ("checkpoints", "upload", __file__, "--preset", "imagnet32"): "did you mean imagenet32?",
            ("jobs", "list", "--status", "runing"): "did you mean running?",
            ("jobs", "list", "--status", "x"): f"there are {', '.join(STATUSES)}",
            ("jobs", "list", "--type", "trainig"): "did you mean training?",
            ("webhooks", "create", "http://example.com", "--event", "job.suceeded"): "did you mean job.succeeded?",
            ("trian",): "Did you mean 'train'?",
            ("jobs", "shew"): "Did you mean 'show'?",
        }.items():
            refused = flowpp(*arguments, FLOWPP_URL=url, COLUMNS="1000")
            assert refused.returncode == 2
            assert near in refused.stderr, (arguments, refused.stderr)
    assert not sent


def test_the_names_of_the_command_are_those_of_the_service() -> None:
    assert set(TYPES) == set(get_args(JobType))
    assert set(STATUSES) == set(get_args(JobStatus))
    assert EVENTS == WEBHOOK_EVENTS


def test_an_unknown_artifact_is_answered_with_the_nearest() -> None:
    grid = {"name": "grid.png", "bytes": 1, "sha256": "", "url": "/v1/jobs/job_1/artifacts/grid.png"}
    page = json.dumps({"data": [grid], "has_more": False, "last_id": "grid.png"}).encode()
    with busy_server(Reply(200, page)) as (url, sent):
        refused = flowpp("jobs", "download", "job_1", "gird.png", "--url", url, COLUMNS="1000")
    assert (refused.returncode, len(sent)) == (2, 1)
    assert "job_1 has no artifact 'gird.png'; did you mean grid.png?" in refused.stderr


STATUS = json.dumps({"at": 0, "queues": {}, "jobs": {}, "training": []}).encode()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Sources of images that cannot be trained on, and one that can."""
    root = tmp_path_factory.mktemp("sources")
    pixels = np.random.default_rng(0).integers(0, 256, (40, 32, 32, 3), np.uint8)
    found = {name: root / name for name in ("good", "odd", "empty", "text", "mixed", "few", "later")}
    for name, path in found.items():
        path.mkdir()
        images = {
            "good": pixels,
            "odd": pixels[:, :31, :31],
            "mixed": [pixels[0], pixels[1, :16]],
            "few": pixels[:5],
            "later": pixels[:9],
        }
        for index, image in enumerate(images.get(name, [])):
            (path / f"{index:02}.png").write_bytes(encode_png(np.ascontiguousarray(image)))
    (found["text"] / "notes.txt").write_text("none")
    (found["later"] / "00.png").write_bytes(b"\x89PNG\r\n\x1a\n damaged")
    found["array"] = root / "array.npy"
    np.save(found["array"], pixels.astype(np.float32))
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.png", encode_png(pixels[0]))
    found["zip"] = root / "one.zip"
    found["zip"].write_bytes(archive.getvalue())
    return found


@pytest.mark.parametrize(
    ("source", "options", "sentence"),
    [
        ("odd", [], "preset tiny does not fit the images of"),
        ("empty", [], "holds no images"),
        ("text", [], "notes.txt: is not an image of a known kind"),
        ("mixed", [], "all must be alike"),
        ("few", [], "has 5 images, fewer than a batch of 8"),
        ("zip", [], "has 1 images, fewer than a batch of 8"),
        ("later", [], "truncated or damaged"),
        ("array", [], "is float32"),
        ("good", ["--set", "training.batch_size=41"], "has 40 images, fewer than a batch of 41"),
        ("good", ["--set", "model.filters=7"], "heads (2) must divide filters (7)"),
        ("good", ["--set", "training.learning_rate=high"], "--set training.learning_rate=...: Input should be a valid"),
        ("good", ["--set", "training.learning_rate=-1"], "greater than 0"),
        ("good", ["--set", "training.warmup_steps=1000"], "together exceed steps"),
        ("good", ["--set", "model.flow=squeeze"], "write a JSON list"),
        ("good", ["--set", "model.filters=null", "--set", "model.heads=3"], "must divide"),
        ("good", ["--metadata", f"{'n' * 65}=1"], "--metadata: String should have at most 64"),
        ("good", ["--cancel-after", "1s"], "'1s' is no duration"),
        ("good", ["--resume-from", "ds_1"], "ds_1 is a dataset"),
    ],
)
def test_a_training_is_checked_before_its_images_are_sent(
    folders: dict[str, Path], source: str, options: list[str], sentence: str
) -> None:
    with busy_server(Reply(200, STATUS)) as (url, sent):
        refused = flowpp("train", folders[source], "--preset", "tiny", *options, "--url", url, COLUMNS="1000")
    assert refused.returncode == 2, refused.stderr
    assert sentence in refused.stderr
    assert "Traceback" not in refused.stderr
    assert {request.method for request in sent} <= {"GET"}
    assert not refused.stdout


def test_an_upload_of_what_holds_no_images_is_refused_here(folders: dict[str, Path]) -> None:
    with busy_server(Reply(200, DATASET)) as (url, sent):
        for source in ("empty", "text"):
            assert flowpp("datasets", "upload", folders[source], "--url", url).returncode == 2
    assert not sent


def test_an_image_set_in_place_of_an_image_is_named_with_what_would_be_right(folders: dict[str, Path]) -> None:
    for source in ("array", "zip"):
        refused = flowpp("likelihood", "job_1", folders[source], COLUMNS="1000")
        assert refused.returncode == 2
        assert f"flowpp datasets upload {folders[source]}), and score it by --dataset" in refused.stderr


def test_a_service_that_cannot_start_says_why_and_which_option_helps(stack: Stack, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for options, sentence in {
        ("--port", str(stack.port), "--data", str(tmp_path / "data")): "Choose another by --port",
        ("--port", "0", "--data", str(stack.data)): "choose another directory by --data",
        ("--port", "0", "--data", str(tmp_path / "file" / "data")): f"{tmp_path / 'file' / 'data'}",
    }.items():
        refused = flowpp("serve", *options)
        assert (refused.returncode, sentence in refused.stderr) == (1, True), refused.stderr
        assert "Errno" not in refused.stderr
        assert "Traceback" not in refused.stderr


def test_a_warm_start_is_checked_before_the_upload(stack: Stack, folders: dict[str, Path], trained: object) -> None:
    before = flowpp("datasets", "list", "--url", stack.url).stdout
    train = ("train", folders["good"], "--preset", "tiny", "--detach", "--url", stack.url)
    for origin, sentence in {"job_none": "there is no job job_none", "ckpt_none": "no checkpoint ckpt_none"}.items():
        refused = flowpp(*train, "--resume-from", origin)
        assert (refused.returncode, sentence in refused.stderr) == (2, True), refused.stderr
    origin = trained.id  # type: ignore[attr-defined]
    refused = flowpp(*train, "--resume-from", origin, "--set", "model.filters=4", COLUMNS="1000")
    assert (refused.returncode, "cannot start this model: its filters is 8" in refused.stderr) == (2, True)
    assert flowpp("datasets", "list", "--url", stack.url).stdout == before


def test_images_whose_job_is_refused_after_the_upload_are_named(folders: dict[str, Path]) -> None:
    page = Reply(200, b'{"data": [], "has_more": false, "last_id": null}')
    refusal = json.dumps({"code": "queue_full", "detail": "as many jobs wait as may; try again later"}).encode()
    with busy_server(Reply(200, STATUS), page, Reply(201, DATASET), Reply(403, refusal)) as (url, _):
        refused = flowpp("train", folders["good"], "--preset", "tiny", "--url", url)
    assert refused.returncode == 2
    assert "The images are stored as ds_1: `flowpp train ds_1` uses them." in refused.stderr
    assert refused.stderr.endswith("flowpp: as many jobs wait as may; try again later (queue_full)\n")


def test_images_that_the_service_has_already_are_said_to_be_reused(folders: dict[str, Path]) -> None:
    page = Reply(200, b'{"data": [%s], "has_more": true, "last_id": "ds_1"}' % DATASET)
    newer = Reply(201, DATASET.replace(b'"created_at": 0', b'"created_at": 1').replace(b"ds_1", b"ds_2"))
    same, job = Reply(200, DATASET), Reply(202, JOB)
    train = ("train", folders["good"], "--preset", "tiny", "--detach", "--url")
    with busy_server(Reply(200, STATUS), page, same, job) as (url, _):
        assert re.match("reuses ds_1, which has the same 1 images", flowpp(*train, url).stderr)
    with busy_server(Reply(200, STATUS), page, newer, job) as (url, _):
        assert re.search("^uploaded 1 images of .*, as ds_2$", flowpp(*train, url).stderr, re.MULTILINE)


def test_the_scopes_are_those_of_the_key_or_all(stack: Stack) -> None:
    assert printed("status", "--url", stack.url)["scopes"] == ["admin"]
