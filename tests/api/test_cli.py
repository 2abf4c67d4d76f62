"""The `flowpp` command as a user types it: what it prints, and its exit codes."""

import json
import os
import re
import subprocess
import sys
import tarfile
import zipfile
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_args
from urllib.parse import unquote_to_bytes

import numpy as np
import pytest
import typer
from PIL import Image

from api.client import Client, Job
from api.client.files import sendable
from api.commands.folders import image_files
from api.commands.output import print_table
from api.stack import Stack
from flowpp import FlowPP
from flowpp.data import encode_png
from tests.api.busy_server import JOB, Reply, busy_server
from tests.waiting import until
from worker.jobs import JobStatus
from worker.redis_server import free_port

PNG = encode_png(np.zeros((8, 8, 3), np.uint8))


def flowpp(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "from api.cli import main; main()", *map(str, arguments)]
    own = {**os.environ, **environment}
    return subprocess.run(command, capture_output=True, text=True, check=False, env=own)


def printed(*arguments: str | Path) -> Any:
    """The one JSON document that the command prints."""
    result = flowpp(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("}\n")
    return json.loads(result.stdout)


def lines(*arguments: str | Path) -> list[Any]:
    """The JSON documents that the command prints, a line each."""
    result = flowpp(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["serve", "--port", "70000"], "65535"),
        (["datasets", "upload", "no-such-file.zip"], "no-such-file.zip"),
        (["train", "ds_x", "--set", "filters=8"], "did you mean model.filters?"),
        (["train", "ds_x", "--set", "widgets=8"], "write model.NAME=VALUE"),
        (["train", "ds_x", "--steps", "0"], "--steps"),
        (["train", "ds_x", "--metadata", "me"], "--metadata me: write NAME=VALUE"),
        (["train", "no-such-folder"], "'no-such-folder' is no file or folder here, and no dataset's id"),
        (["likelihood", "job_x"], "give images (files or folders) or --dataset"),
        (["likelihood", "job_x", __file__, "--latents"], "choose a directory by --output"),
        (
            ["likelihood", "job_x", Path(__file__).parent],
            "holds no images that can be scored; these files are of other kinds: ",
        ),
        (["sample", "job_x", "--interpolate", __file__, __file__, "--seed", "1"], "it goes with neither"),
        (["jobs", "shew", "job_x"], "shew"),
        (["jobs", "list", "--url", "localhost:8000"], "'localhost:8000' is no url of a service"),
    ],
)
def test_bad_input_is_a_sentence_and_exit_code_2(arguments: list[str | Path], sentence: str) -> None:
    result = flowpp(*arguments)
    assert result.returncode == 2
    assert sentence in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr
    assert not result.stdout


def test_cancel_after_takes_units_and_what_is_none_is_refused_at_once() -> None:
    with busy_server(Reply(202)) as (url, sent):
        assert flowpp("sample", "job_1", "--cancel-after", "2h", "--detach", "--url", url).returncode == 0
    assert sent[0].headers["cancel-after"] == "2h"
    with busy_server(Reply(202)) as (url, sent):
        refused = flowpp("sample", "job_1", "--cancel-after", "soon", "--url", url)
    assert (refused.returncode, "90s, 5m, 2h" in " ".join(refused.stderr.split())) == (2, True)
    assert not sent


def test_a_wait_that_the_service_asks_for_is_said_once() -> None:
    busy = Reply(429, b'{"code": "rate_limited", "detail": "later"}', {"Retry-After": "1"})
    with busy_server(busy, Reply()) as (url, _):
        shown = flowpp("jobs", "show", "job_1", "--json", "--url", url)
    assert shown.stderr == "the service is busy; the next try is in 1 s\n"
    assert json.loads(shown.stdout)["id"] == "job_1"


def test_files_are_not_mixed_with_those_that_lie_there(tmp_path: Path) -> None:
    (tmp_path / "old.png").write_bytes(b"")
    with busy_server(Reply(202)) as (url, sent):
        for command in (["sample", "job_1"], ["likelihood", "job_1", __file__], ["checkpoints", "download", "ckpt_1"]):
            refused = flowpp(*command, "--output", tmp_path, "--url", url, COLUMNS="1000")
            assert refused.returncode == 2
            assert f"{tmp_path} exists; choose another --output" in refused.stderr
    assert not sent


def test_a_record_is_printed_without_blanks_at_the_ends_of_lines() -> None:
    with busy_server(Reply()) as (url, _):
        shown = flowpp("jobs", "show", "job_1", "--url", url).stdout.splitlines()
    assert [line for line in shown if line != line.rstrip()] == []
    assert shown[0].split() == ["id", "job_1"]


def test_a_watched_job_that_is_queued_tells_how_many_are_before_it() -> None:
    waits = [Reply(200, JOB.replace(b'"queue_position": 0', b'"queue_position": %d' % place)) for place in (3, 1)]
    done = Reply(200, JOB.replace(b"queued", b"succeeded").replace(b'"queue_position": 0', b'"queue_position": null'))
    status = b'id: 1-0\ndata: {"id": "1-0", "job": "job_1", "type": "status", "created_at": 0, "data": %s}\n\n'
    events = Reply(200, status % b'{"status": "succeeded"}', {"Content-Type": "text/event-stream"})
    with busy_server(waits[0], *waits, done, events, done) as (url, _):
        watched = flowpp("jobs", "watch", "job_1", "--url", url)
    assert watched.returncode == 0, watched.stderr
    assert watched.stderr.splitlines() == ["queued, 3 before it", "queued, 1 before it", "succeeded"]


def test_the_version_is_that_of_the_package() -> None:
    told = flowpp("--version")
    assert (told.returncode, told.stdout) == (0, f"flowpp {version('flowpp')}\n")


def test_no_service_is_a_sentence_and_exit_code_3() -> None:
    result = flowpp("jobs", "list", "--url", f"http://127.0.0.1:{free_port()}")
    assert result.returncode == 3
    assert "Is `flowpp serve` running" in result.stderr
    assert "Traceback" not in result.stderr


def test_what_is_no_service_of_ours_is_a_sentence_and_exit_code_1() -> None:
    with busy_server(Reply(200, b"<html>")) as (url, _):
        result = flowpp("jobs", "list", "--url", url)
    assert result.returncode == 1
    assert "is no flowpp service" in result.stderr
    assert "Traceback" not in result.stderr


def test_a_refusal_of_the_service_is_its_sentence_once_and_exit_code_2(stack: Stack) -> None:
    result = flowpp("jobs", "show", "job_no_such", "--url", stack.url)
    assert result.returncode == 2
    assert result.stderr == "flowpp: there is no job job_no_such (job_not_found)\n"
    unknown = flowpp("train", "ds_no_such", "--preset", "tiny", "--url", stack.url)
    assert (unknown.returncode, unknown.stderr.count("there is no dataset ds_no_such")) == (2, 1)


def test_the_key_of_the_environment_is_sent_and_not_shown() -> None:
    with busy_server(Reply(401, b'{"code": "unauthenticated", "detail": "no such key"}')) as (url, sent):
        result = flowpp("jobs", "show", "job_1", FLOWPP_URL=url, FLOWPP_API_KEY="flowpp_secret")
        flowpp("jobs", "show", "job_1", "--key", "flowpp_other", "--url", url)
    assert (result.returncode, "does not accept this key" in result.stderr) == (2, True)
    assert [request.headers["authorization"] for request in sent] == ["Bearer flowpp_secret", "Bearer flowpp_other"]
    told = result.stdout + result.stderr + flowpp("jobs", "show", "--help", FLOWPP_API_KEY="flowpp_secret").stdout
    assert "secret" not in told


def test_help_tells_the_exit_codes() -> None:
    said = " ".join(flowpp("--help").stdout.split())
    assert "3 the service cannot be reached; 4 the job was cancelled; 130 stopped by Ctrl-C." in said


def test_the_command_starts_without_what_only_the_service_needs() -> None:
    code = "import sys, api.cli; print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "httpx" in loaded
    assert not {"celery", "fastapi", "fsspec", "numpy", "redis", "torch"} & set(loaded)


def test_likelihood_downloads_the_files_that_it_is_asked_for(
    stack: Stack, trained: Job, images: np.ndarray, tmp_path: Path
) -> None:
    (tmp_path / "0.png").write_bytes(encode_png(images[0]))
    score = ("likelihood", trained.id, tmp_path / "0.png", "--url", stack.url)
    scored = flowpp(*score, "--bits-map", "--latents", "-o", tmp_path / "all")
    assert scored.returncode == 0, scored.stderr
    assert {"bits_map.npz", "bits_map.png", "latents.npz"} <= {path.name for path in (tmp_path / "all").iterdir()}
    assert np.load(tmp_path / "all" / "latents.npz").files
    assert flowpp(*score, "--latents", "-o", tmp_path / "latents").returncode == 0
    names = {path.name for path in (tmp_path / "latents").iterdir()}
    assert "latents.npz" in names
    assert "bits_map.png" not in names
    later = flowpp(*score, "--bits-map", "--detach")
    assert later.stdout.startswith("job_"), later.stderr


def test_likelihood_takes_folders_for_the_images_in_them(
    stack: Stack, trained: Job, images: np.ndarray, tmp_path: Path
) -> None:
    names = ["b.png", "deep/er/c.PNG", "a.png", "deep/a.png", "notes.txt", ".hidden.png", ".thumbnails/a.png"]
    for name in names:
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"notes" if name == "notes.txt" else encode_png(images[0]))
    (tmp_path / "one.png").write_bytes(encode_png(images[1]))
    scored = printed("likelihood", trained.id, tmp_path / "one.png", tmp_path / "folder", "--url", stack.url)["result"]
    assert [image["name"] for image in scored["images"]] == ["one.png", "a.png", "b.png", "deep/a.png", "deep/er/c.PNG"]
    many = ["likelihood", trained.id, tmp_path / "one.png", *[tmp_path / "folder"] * 8]  # so that they are in a file
    scored = printed(*many, "--url", stack.url)["result"]
    below = ["a.png", "b.png", "deep/a.png", "deep/er/c.PNG"]
    assert [image["name"] for image in scored["images"]] == ["one.png", *below * 8]


def test_a_folder_of_too_many_images_is_to_be_uploaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("api.commands.folders.MAX_IMAGES", 2)
    for name in ("a.png", "b.png", "c.png"):
        (tmp_path / name).write_bytes(PNG)
    with pytest.raises(typer.BadParameter, match=r"more than 2 images.*\(flowpp datasets upload "):
        image_files([tmp_path])
    monkeypatch.undo()
    assert len(image_files([tmp_path])) == 3
    monkeypatch.setattr("api.commands.folders.MAX_BYTES", 3 * len(PNG) - 1)
    with pytest.raises(typer.BadParameter, match=f"or {3 * len(PNG) - 1} bytes of them"):
        image_files([tmp_path])


def test_content_determines_the_images_of_a_folder(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    files = {"plain": PNG, "deep/notes.txt": PNG, "b.gz": PNG, "c.npy": PNG, ".hidden": PNG, "Thumbs.db": PNG}
    others = {"web.png": b"<html></html>", "moving.png": b"GIF89a", "empty.png": b"", "array.png": b"\x93NUMPY\x01\x00"}
    for name, content in (files | others).items():
        path = tmp_path / "folder" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    assert [name for name, _ in image_files([tmp_path / "folder"])] == ["b.gz", "c.npy", "deep/notes.txt", "plain"]
    note = capfd.readouterr().err
    assert "skips 4 of the files" in note
    assert all(name in note for name in others)
    assert "Thumbs" not in note

    for name in files:
        (tmp_path / "folder" / name).unlink()
    with pytest.raises(typer.BadParameter, match="no images that can be scored; these files are of other kinds: array"):
        image_files([tmp_path / "folder"])


@pytest.mark.parametrize("name", ["images", "images.png", "images.zip"])
def test_content_determines_whether_a_file_is_an_image_set(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", PNG)
    with pytest.raises(typer.BadParameter, match="is an image set; upload it"):
        image_files([path])
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        tar.addfile(tarfile.TarInfo("a.png"))
    with pytest.raises(typer.BadParameter, match="is an image set; upload it"):
        image_files([path])
    path.write_bytes(PNG)
    assert image_files([path]) == [(name, path)]


def test_different_names_stay_different_on_their_way_to_the_service() -> None:
    names = [
        b"\xff",
        b"%FF",
        b"%25FF",
        b"%ff",
        b"%",
        b"%\xff",
        b"%%FF",
        b"100%.png",
        b"%zz",
        b"\xed\xa0\x80",
        b"%ED%A0%80",
    ]
    sent = [sendable(os.fsdecode(name)) for name in names]
    assert len(set(sent)) == len(names)
    assert [unquote_to_bytes(each) for each in sent] == names
    assert sendable("100%.png") == "100%.png"


def test_a_table_has_a_line_for_each_row_whatever_is_in_it(capsys: pytest.CaptureFixture[str]) -> None:
    print_table(("name", "bits/dim"), [("a\nb\x1b[31m\u202e.png", "1"), ("\xe9\r\u2028", "2")], headed=True)
    lines = capsys.readouterr().out.split("\n")
    assert lines[1].split() == ["a\\nb\\x1b[31m\\u202e.png", "1"]
    assert lines[2].split() == ["\xe9\\r\\u2028", "2"]
    assert len(lines) == 4


def test_upload_train_score_sample_and_download(
    stack: Stack, client: Client, archive: Path, images: np.ndarray, tmp_path: Path
) -> None:
    at = ("--url", stack.url)
    own = tmp_path / "own.npz"  # tests that share the stack may have uploaded the same images before
    np.savez(own, train=images[31::-1], validation=images[32:])
    uploaded = flowpp("datasets", "upload", own, *at)
    dataset = uploaded.stdout.strip()
    assert uploaded.stderr == f"uploaded 48 images of 3x32x32, of them 16 for validation, as {dataset}\n"
    again = flowpp("datasets", "upload", own, *at)
    assert (again.stdout.strip(), again.stderr.startswith(f"reuses {dataset}, ")) == (dataset, True)
    assert dataset in flowpp("datasets", "list", *at).stdout
    assert "32x32" not in flowpp("datasets", "show", dataset, *at).stdout.splitlines()[0]

    train = flowpp("train", dataset, "--preset", "tiny", "--set", "model.filters=4", "--metadata", "who=me", *at)
    assert train.returncode == 0, train.stderr
    job = train.stdout.strip()
    assert client.jobs.get(job).request["model"]["filters"] == 4
    assert "running" in train.stderr
    assert "best checkpoint ckpt_" in train.stderr
    assert f"{job}  training  succeeded  100%" in flowpp("jobs", "list", "--metadata", "who=me", *at).stdout

    for index, image in enumerate(images[:2]):
        (tmp_path / f"{index}.png").write_bytes(encode_png(image))
    score = flowpp("likelihood", job, tmp_path / "0.png", tmp_path / "1.png", *at)
    assert score.returncode == 0, score.stderr
    assert re.findall(r"^(\S+|mean of 2) +\d+\.\d{4}", score.stdout, re.MULTILINE) == ["0.png", "1.png", "mean of 2"]

    sample = flowpp("sample", job, "-n", "4", "-o", tmp_path / "samples", *at)
    assert sample.returncode == 0, sample.stderr
    assert sample.stdout.strip() == str(tmp_path / "samples" / "grid.png")
    files = sorted(path.relative_to(tmp_path / "samples").as_posix() for path in (tmp_path / "samples").rglob("*.*"))
    assert files == ["grid.png", "png/0000.png", "png/0001.png", "png/0002.png", "png/0003.png", "samples.npz"]
    with Image.open(tmp_path / "samples" / "grid.png") as image:
        image.verify()

    checkpoint = flowpp("checkpoints", "list", "--job", job, *at).stdout.split()[0]
    assert flowpp("checkpoints", "download", checkpoint, "-o", tmp_path / "model", *at).returncode == 0
    assert FlowPP.load(tmp_path / "model").config.filters == 4
    assert flowpp("checkpoints", "download", checkpoint, "-o", tmp_path / "model.zip", *at).returncode == 0
    assert (tmp_path / "model.zip").read_bytes().startswith(b"PK")
    assert flowpp("checkpoints", "delete", checkpoint, *at).returncode == 0
    assert flowpp("checkpoints", "show", checkpoint, *at).returncode == 2


def test_json_is_all_that_a_program_reads(stack: Stack, trained: Job, images: np.ndarray, tmp_path: Path) -> None:
    at = ("--url", stack.url)
    own = tmp_path / "own.npz"  # no other test has a dataset of these, which is deleted at the end
    np.savez(own, train=images[1:33], validation=images[33:])
    dataset = printed("datasets", "upload", own, *at)["id"]
    assert printed("datasets", "show", dataset, *at)["num_images"] == 47
    sheet = printed("datasets", "contact-sheet", dataset, "-o", tmp_path / "sheet.png", *at)["path"]
    assert Path(sheet).read_bytes().startswith(b"\x89PNG")
    assert dataset in [each["id"] for each in lines("datasets", "list", *at)]

    job = printed("train", dataset, "--preset", "tiny", "--steps", "5", *at)
    assert (job["status"], job["result"]["step"]) == ("succeeded", 5)
    assert [event["type"] for event in lines("jobs", "watch", job["id"], *at)].count("metrics") > 1
    assert printed("jobs", "show", job["id"], *at) == job
    assert len(lines("jobs", "list", "--limit", "2", *at)) == 2
    assert "begins" in lines("jobs", "logs", job["id"], *at)[0]["line"]
    assert [each["status"] for each in lines("jobs", "attempts", job["id"], *at)] == ["succeeded"]
    assert "training_curve.png" in [each["name"] for each in lines("jobs", "artifacts", job["id"], *at)]
    (saved,) = lines("jobs", "download", job["id"], "training_curve.png", "-o", tmp_path / "files", *at)
    assert Path(saved["path"]).read_bytes().startswith(b"\x89PNG")

    for index, image in enumerate(images[:2]):
        (tmp_path / f"{index}.png").write_bytes(encode_png(image))
    two = (tmp_path / "0.png", tmp_path / "1.png")
    scored = printed("likelihood", job["id"], *two, *at)["result"]
    assert [image["name"] for image in scored["images"]] == ["0.png", "1.png"]
    assert all(image["bits_per_dim"] > 0 for image in scored["images"])
    many = [tmp_path / f"many{index}.png" for index in range(34)]
    for index, path in enumerate(many):
        path.write_bytes(encode_png(images[index]))
    each = printed("likelihood", job["id"], *many, *at)["result"]["images"]
    assert [image["name"] for image in each] == [path.name for path in many], "more than a job's result holds"
    assert each[0]["bits_per_dim"] > 0
    way = printed("sample", job["id"], "--interpolate", *two, "-n", "5", "-o", tmp_path / "way", *at)
    assert (way["status"], len(list((tmp_path / "way" / "png").iterdir()))) == ("succeeded", 5)

    assert "tiny" in [preset["id"] for preset in lines("presets", "list", *at)]
    (checkpoint, *_) = lines("checkpoints", "list", "--job", job["id"], *at)
    assert printed("checkpoints", "show", checkpoint["id"], *at) == checkpoint
    path = printed("checkpoints", "download", checkpoint["id"], "-o", tmp_path / "model", *at)["path"]
    assert (Path(path) / "manifest.json").exists()
    assert printed("checkpoints", "delete", checkpoint["id"], *at) == {"id": checkpoint["id"], "deleted": True}
    assert printed("jobs", "delete", job["id"], *at)["deleted"]
    assert printed("datasets", "delete", dataset, *at)["deleted"]


def test_a_cancelled_job_is_listed_shown_and_watched_as_cancelled(stack: Stack, client: Client, trained: Job) -> None:
    at = ("--url", stack.url)
    dataset = trained.request["dataset"]
    started = flowpp("train", dataset, "--preset", "tiny", "--steps", "100000", "--detach", *at)
    job = started.stdout.strip()
    assert flowpp("jobs", "cancel", job, *at).returncode == 0
    watched = flowpp("jobs", "watch", job, *at)
    assert watched.returncode == 4, "which is no failure"
    assert f"job {job} is cancelled" in watched.stderr
    assert printed("jobs", "show", job, *at)["status"] == "cancelled"
    assert f"{job}  training  cancelled" in flowpp("jobs", "list", "--status", "cancelled", *at).stdout


def test_a_job_is_paused_resumed_and_deleted_while_it_runs(stack: Stack, client: Client, trained: Job) -> None:
    at = ("--url", stack.url)
    warm = ("--resume-from", trained.id)
    dataset = trained.request["dataset"]
    job = flowpp("train", dataset, "--preset", "tiny", "--steps", "100000", *warm, "--detach", *at).stdout.strip()
    assert flowpp("jobs", "pause", job, *at).stdout.strip() in ("pausing", "paused")
    until(lambda: client.jobs.get(job).status == "paused")
    assert flowpp("jobs", "resume", job, *at).stdout.strip() == "queued"
    until(lambda: (progress := client.jobs.get(job).progress) is not None and progress.step > 0)
    assert flowpp("jobs", "delete", job, *at).returncode == 0
    until(lambda: job not in {each.id for each in client.jobs.list()})
    gone = flowpp("jobs", "show", job, *at)
    assert (gone.returncode, f"there is no job {job}" in gone.stderr) == (2, True)


COMPLETIONS = [
    ("flowpp jo", ["jobs"]),
    ("flowpp sta", ["status"]),
    ("flowpp status --js", ["--json"]),
    ("flowpp jobs pa", ["pause"]),
    ("flowpp train x --preset imagenet64", ["imagenet64", "imagenet64-5bit"]),
    ("flowpp checkpoints upload x.npz --preset c", ["cifar10"]),
    ("flowpp train x --det", ["--detach"]),
    ("flowpp jobs list --type s", ["sampling"]),
    ("flowpp jobs list --status ", list(get_args(JobStatus))),
]


def completed(text: str, **environment: str) -> list[str]:
    """What bash suggests for the last word."""
    words = {"COMP_WORDS": text, "COMP_CWORD": str(len(text.split(" ")) - 1)}
    return flowpp(_FLOWPP_COMPLETE="complete_bash", **words, **environment).stdout.splitlines()


@pytest.mark.parametrize(("text", "suggestions"), COMPLETIONS)
def test_the_shell_completes_commands_options_and_presets(text: str, suggestions: list[str]) -> None:
    assert completed(text)[: len(suggestions)] == suggestions


def test_the_shell_completes_ids_and_says_nothing_where_no_service_is(
    stack: Stack, client: Client, trained: Job
) -> None:
    assert trained.id in completed("flowpp sample job_", FLOWPP_URL=stack.url)
    assert completed(f"flowpp jobs show {trained.id[:12]}", FLOWPP_URL=stack.url)
    for words in ("train ds_", "datasets show ds_", "datasets delete ds_"):
        assert trained.request["dataset"] in completed(f"flowpp {words}", FLOWPP_URL=stack.url)
    checkpoint = next(iter(client.checkpoints.list())).id
    for words in ("show", "download", "delete"):
        assert checkpoint in completed(f"flowpp checkpoints {words} ckpt_", FLOWPP_URL=stack.url)
    assert checkpoint in completed("flowpp train x --resume-from ckpt_", FLOWPP_URL=stack.url)
    nobody = f"http://127.0.0.1:{free_port()}"
    assert "".join(completed("flowpp sample job_", FLOWPP_URL=nobody)) == ""


def test_the_shell_completes_ids_of_webhooks() -> None:
    webhook = {"id": "wh_1", "object": "webhook", "owner": "local", "created_at": 0, "url": "https://example.com/"}
    page = {
        "data": [webhook | {"events": [], "status": "active", "disabled_reason": None, "dropped": 0}],
        "has_more": False,
        "last_id": "wh_1",
    }
    with busy_server(Reply(200, json.dumps(page).encode())) as (url, _):
        for words in ("show", "delete", "ping", "deliveries"):
            assert completed(f"flowpp webhooks {words} wh_", FLOWPP_URL=url) == ["wh_1"]


def test_completion_is_installed_where_bash_finds_it(tmp_path: Path) -> None:
    own = {"HOME": str(tmp_path), "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    for shell in ("bash", "zsh", "fish"):
        assert "_FLOWPP_COMPLETE" in flowpp("--show-completion", shell, **own).stdout
    assert flowpp("--install-completion", "bash", **own).returncode == 0
    registered = subprocess.run(
        ["bash", "--norc", "-c", f"source {tmp_path}/.bashrc; complete -p flowpp"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **own},
    )
    assert registered.stdout == "complete -o default -F _flowpp_completion flowpp\n"
