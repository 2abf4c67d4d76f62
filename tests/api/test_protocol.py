"""Standard HTTP: HEAD, refused encodings, single fields, and streams that end for browsers."""

import asyncio
import gzip
import zlib

import httpx
import numpy as np
import pytest
from fastapi.routing import APIRoute

from api.app import create_app
from api.client import AsyncClient, Client, Event
from flowpp.data import encode_png
from tests.api.conftest import Filled
from worker.settings import Settings

PNG = encode_png(np.zeros((32, 32, 3), np.uint8))
UNLIKE = frozenset({"date", "x-request-id", "retry-after"})
"""Headers that differ from one answer to the next."""


def paths(filled: Filled) -> list[str]:
    """Every path of the OpenAPI document that has GET, with ids that exist, and those that it does not show."""
    document = filled.client.get("/openapi.json").json()["paths"]
    found = []
    for path, operations in document.items():
        if "get" in operations:
            for name, ids in filled.ids.items():
                path = path.replace(f"{{{name}}}", ids[-1])
            assert "{" not in path, "a parameter without known ids"
            found.append(path)
    assert len(found) > 15
    plain = ["/", "/dashboard/app.js", "/metrics", "/docs", "/docs/errors", "/redoc", "/openapi.json"]
    return [*found, *plain, "/static-offline-docs/swagger-ui.css"]


def test_head_is_answered_as_get_without_a_body(filled: Filled) -> None:
    for path in paths(filled):
        get, head = filled.client.get(path), filled.client.head(path)
        assert head.status_code == get.status_code, path
        assert head.content == b""
        assert get.status_code == 200 or path == "/readyz", path
        if path in ("/metrics", "/v1/status", "/readyz", "/healthz"):  # their figures change meanwhile
            assert head.headers["content-type"] == get.headers["content-type"]
            continue
        of_get, of_head = (
            {name: value for name, value in response.headers.items() if name not in UNLIKE} for response in (get, head)
        )
        assert of_head == of_get, path


def test_every_route_of_get_has_one_of_head(filled: Filled) -> None:
    """Also those that the OpenAPI document does not show."""
    routers = [route.original_router for route in create_app(Settings()).routes if hasattr(route, "original_router")]
    routes = [route for router in routers for route in router.routes if isinstance(route, APIRoute)]
    methods: dict[str, set[str]] = {}
    for route in routes:
        methods.setdefault(route.path, set()).update(route.methods)
    assert len(methods) > 25
    assert not [path for path, found in methods.items() if "GET" in found and "HEAD" not in found]


def test_head_is_refused_as_get_is(filled: Filled) -> None:
    for path in ("/v1/jobs/job_0", "/v1/jobs?limit=0", "/v1/nothing", "/v1/jobs/job_0/events", "/dashboard/nothing"):
        get, head = filled.client.get(path), filled.client.head(path)
        assert (head.status_code, head.content) == (get.status_code, b"")
        assert get.status_code in (404, 422)
        if path.startswith("/v1/jobs"):  # the detail of the others names the method
            assert head.headers["content-length"] == get.headers["content-length"]
    assert filled.client.head("/v1/jobs", headers={"Host": "example.com"}).status_code == 403


def test_head_of_a_live_stream_ends(filled: Filled) -> None:
    accept = {"Accept": "text/event-stream"}
    job = filled.ids["job_id"][0]
    head = filled.client.head(f"/v1/jobs/{job}/events", headers=accept)
    with filled.client.stream("GET", f"/v1/jobs/{job}/events", headers=accept) as get:
        assert head.status_code == get.status_code == 200
        assert head.headers["content-type"] == get.headers["content-type"]
        assert head.headers["cache-control"] == get.headers["cache-control"]


def test_the_openapi_document_shows_no_head(filled: Filled) -> None:
    document = filled.client.get("/openapi.json").json()
    assert not [path for path, operations in document["paths"].items() if "head" in operations]


def test_405_names_every_method_that_the_path_has(filled: Filled) -> None:
    document = filled.client.get("/openapi.json").json()["paths"]
    for path, operations in document.items():
        for name, ids in filled.ids.items():
            path = path.replace(f"{{{name}}}", ids[-1])
        allowed = {method.upper() for method in operations} | ({"HEAD"} if "get" in operations else set())
        for method in ("PATCH", "OPTIONS"):
            response = filled.client.request(method, path)
            assert response.status_code == 405, path
            assert set(response.headers["allow"].split(", ")) == allowed, path


BODY = b'{"model": "ckpt_0"}'
JSON = {"Content-Type": "application/json"}
FORM = b'--B\r\nContent-Disposition: form-data; name="files"; filename="a.png"\r\n%s\r\n' + PNG + b"\r\n--B--\r\n"
ENCODED = {
    "gzip": gzip.compress(BODY),
    "x-gzip": gzip.compress(BODY),
    "deflate": zlib.compress(BODY),
    "br": b"\x0b\x09\x80" + BODY + b"\x03",
    "zstd": b"\x28\xb5\x2f\xfd" + BODY,
    "aes128gcm": BODY,
    "made-up": BODY,
    "gzip, identity": gzip.compress(BODY),
    "identity, GZip": gzip.compress(BODY),
}


@pytest.mark.parametrize("coding", ENCODED)
@pytest.mark.parametrize("path", ["training-jobs", "likelihood-jobs", "sampling-jobs", "webhooks"])
def test_an_encoded_body_is_415_and_the_answer_says_what_is_taken(
    coding: str, path: str, lasting_http: httpx.Client
) -> None:
    response = lasting_http.post(f"/v1/{path}", content=ENCODED[coding], headers=JSON | {"Content-Encoding": coding})
    assert (response.status_code, response.json()["code"]) == (415, "unsupported_media_type")
    assert response.headers["accept-encoding"] == "identity"
    assert "Content-Encoding" in response.json()["detail"]


@pytest.mark.parametrize("path", ["datasets", "checkpoints", "likelihood-jobs"])
def test_an_encoded_form_is_415(path: str, lasting_http: httpx.Client) -> None:
    headers = {"Content-Type": "multipart/form-data; boundary=B", "Content-Encoding": "gzip"}
    response = lasting_http.post(f"/v1/{path}", content=gzip.compress(FORM % b""), headers=headers)
    assert response.status_code == 415
    assert response.headers["accept-encoding"] == "identity"


def test_several_headers_of_an_encoding_count_together(lasting_http: httpx.Client) -> None:
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "identity"), ("Content-Encoding", "br")]
    assert lasting_http.post("/v1/sampling-jobs", content=BODY, headers=headers).status_code == 415


@pytest.mark.parametrize("coding", ["identity", "Identity", "", "identity, identity"])
def test_a_body_that_is_said_to_be_as_it_is_is_read(coding: str, lasting_http: httpx.Client) -> None:
    response = lasting_http.post("/v1/sampling-jobs", content=BODY, headers=JSON | {"Content-Encoding": coding})
    assert (response.status_code, response.json()["code"]) == (404, "checkpoint_not_found")


def test_an_encoding_without_a_body_does_not_matter(filled: Filled) -> None:
    job = filled.ids["job_id"][0]
    response = filled.client.post(f"/v1/jobs/{job}/cancel", headers={"Content-Encoding": "gzip"})
    assert response.status_code == 409, "as without the header: it has finished"


@pytest.mark.parametrize("header", ["Content-Transfer-Encoding: base64", "Content-Transfer-Encoding: QUOTED-PRINTABLE",
                                    "Content-Encoding: gzip"])  # fmt: skip
def test_an_encoded_part_of_a_form_is_415(header: str, lasting_http: httpx.Client) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=B"}
    response = lasting_http.post("/v1/likelihood-jobs", content=FORM % (header + "\r\n").encode(), headers=form)
    assert response.status_code == 415
    assert header.partition(":")[0] in response.json()["detail"]


def test_a_part_that_is_said_to_be_as_it_is_is_read(lasting_http: httpx.Client) -> None:
    form = {"Content-Type": "multipart/form-data; boundary=B"}
    for encoding in (b"binary", b"8BIT", b"7bit"):
        content = FORM.replace(b'"files"', b'"file"') % (b"Content-Transfer-Encoding: " + encoding + b"\r\n")
        assert lasting_http.post("/v1/datasets", content=content, headers=form).status_code in (200, 201)


def form(*fields: tuple[str, str]) -> bytes:
    parts = [
        f'--B\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields
    ]
    return b"".join(parts) + FORM % b""


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("seed", "12"),
        ("seed", "11"),
        ("model", ["ckpt_0", "ckpt_1"]),
        ("metadata[a]", "bc"),
        ("bits_map", ["true", "true"]),
    ],
)
def test_a_repeated_field_of_a_form_is_refused(name: str, values: list[str], lasting_http: httpx.Client) -> None:
    content = form(*([] if name == "model" else [("model", "ckpt_0")]), *((name, value) for value in values))
    headers = {"Content-Type": "multipart/form-data; boundary=B"}
    for path in ("likelihood-jobs", "sampling-jobs"):
        response = lasting_http.post(f"/v1/{path}", content=content, headers=headers)
        problem = response.json()
        assert (response.status_code, problem["code"], problem["errors"][0]["path"]) == (422, "invalid_request", name)
        assert "more than once" in problem["detail"]


def test_a_repeated_preset_of_an_upload_is_refused(lasting_http: httpx.Client) -> None:
    files = [("file", ("a.npz", b"x")), ("preset", (None, "cifar10")), ("preset", (None, "imagenet32"))]
    response = lasting_http.post("/v1/checkpoints", files=files)  # type: ignore[arg-type]
    assert (response.status_code, response.json()["errors"][0]["path"]) == (422, "preset")


@pytest.mark.parametrize(
    ("path", "body", "name"),
    [
        ("sampling-jobs", '{"model": "m", "seed": 1, "seed": 2}', "seed"),
        ("likelihood-jobs", '{"model": "m", "metadata": {"a": "b", "a": "b"}}', "a"),
        ("training-jobs", '{"dataset": "d", "model": {"preset": "tiny"}, "dataset": "e"}', "dataset"),
        (
            "training-jobs",
            '{"dataset": "d", "model": {"preset": "tiny"}, "training": {"steps": 1, "steps": 2}}',
            "steps",
        ),
        ("training-jobs", '{"dataset": "d", "d\\u0061taset": "e", "model": {"preset": "tiny"}}', "dataset"),
        ("webhooks", '{"url": "https://example.com", "url": "https://example.org"}', "url"),
    ],
)
def test_a_repeated_name_in_json_is_refused(path: str, body: str, name: str, lasting_http: httpx.Client) -> None:
    response = lasting_http.post(f"/v1/{path}", content=body.encode(), headers=JSON)
    problem = response.json()
    assert (response.status_code, problem["code"], problem["errors"][0]["path"]) == (422, "invalid_request", name)
    assert "more than once" in problem["detail"]


@pytest.mark.parametrize(
    "query",
    [
        "limit=1&limit=2",
        "limit=2&limit=2",
        "order=asc&order=desc",
        "type=training&type=sampling",
        "status=queued&status=queued",
        "metadata[a]=1&metadata[a]=2",
        "metadata[a]=1&metadata%5Ba%5D=2",
        "after=job_0&after=job_0",
    ],
)
def test_a_repeated_parameter_is_refused(query: str, lasting_http: httpx.Client) -> None:
    response = lasting_http.get(f"/v1/jobs?{query}")
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")
    assert "more than once" in response.json()["detail"]


def test_a_parameter_that_is_a_list_may_be_repeated(filled: Filled) -> None:
    events = f"/v1/jobs/{filled.ids['job_id'][0]}/events"
    assert filled.client.get(f"{events}?type=status&type=warning").json()["data"]
    assert filled.client.get("/v1/jobs?metadata[a]=1&metadata[b]=1").status_code == 200


@pytest.mark.parametrize("name", ["Idempotency-Key", "Cancel-After"])
def test_a_repeated_header_of_one_value_is_refused(name: str, lasting_http: httpx.Client) -> None:
    headers = [("Content-Type", "application/json"), (name, "60"), (name, "70")]
    response = lasting_http.post("/v1/sampling-jobs", content=BODY, headers=headers)
    assert (response.status_code, response.json()["code"]) == (422, "invalid_request")


def test_headers_that_are_lists_may_be_repeated(filled: Filled) -> None:
    url = f"/v1/datasets/{filled.ids['dataset_id'][-1]}/contact-sheet"
    tag = filled.client.get(url).headers["etag"]
    assert filled.client.get(url, headers=[("If-None-Match", '"a"'), ("If-None-Match", tag)]).status_code == 304
    wanted = [("Content-Type", "application/json"), ("Prefer", "respond-async"), ("Prefer", "wait=1")]
    assert filled.client.post("/v1/sampling-jobs", content=BODY, headers=wanted).status_code == 404


def browser(client: httpx.Client, path: str) -> list[str]:
    """The ids that an EventSource of a browser receives until it stops (WHATWG HTML 9.2): it connects again whenever a
    stream ends, behind the last event, until the answer is no 200.
    """
    received: list[str] = []
    for _ in range(10):
        headers = {"Accept": "text/event-stream", **({"Last-Event-ID": received[-1]} if received else {})}
        with client.stream("GET", path, headers=headers) as response:
            if response.status_code != 200:
                assert response.status_code == 204
                assert not response.read()
                return received
            received += [line.removeprefix("id: ") for line in response.iter_lines() if line.startswith("id: ")]
    raise AssertionError("it would go on for ever")


@pytest.mark.parametrize("query", ["", "?type=status", "?type=warning", "?type=checkpoint&type=log"])
def test_a_browsers_event_source_stops_at_the_end_of_a_job(query: str, filled: Filled) -> None:
    events = f"/v1/jobs/{filled.ids['job_id'][0]}/events"
    stored = [event["id"] for event in filled.client.get(events + query).json()["data"]]
    assert browser(filled.client, events + query) == stored
    assert stored or "status" not in query


def test_a_stream_goes_on_behind_any_earlier_event(filled: Filled) -> None:
    events = f"/v1/jobs/{filled.ids['job_id'][0]}/events"
    stored = [event["id"] for event in filled.client.get(events).json()["data"]]
    assert len(stored) > 2
    for index, last in enumerate([*stored, "9999999999999-0"]):
        headers = {"Accept": "text/event-stream", "Last-Event-ID": last}
        response = filled.client.get(events, headers=headers)
        assert response.status_code == (200 if stored[index + 1 :] else 204)
        assert [line[4:] for line in response.text.splitlines() if line.startswith("id: ")] == stored[index + 1 :]
        after = filled.client.get(f"{events}?after={last}", headers={"Accept": "text/event-stream"})
        assert (after.status_code, after.text) == (response.status_code, response.text)


def test_a_browsers_event_source_stops_when_a_job_is_deleted(filled: Filled) -> None:
    response = filled.client.get("/v1/jobs/job_gone/events", headers={"Accept": "text/event-stream"})
    assert response.status_code == 404, "any status but 200 stops it"


def test_the_client_ends_where_there_are_no_more_events(filled: Filled) -> None:
    url, job = str(filled.client.base_url), filled.ids["job_id"][0]
    with Client(url) as client:
        events = list(client.jobs.events(job))
        assert [event.terminal for event in events] == [False] * (len(events) - 1) + [True]
        assert list(client.jobs.events(job, after=events[-1].id)) == []
        assert list(client.jobs.events(job, types=["warning"])) == []


def test_the_asynchronous_client_ends_there_too(filled: Filled) -> None:
    async def events() -> list[Event]:
        async with AsyncClient(str(filled.client.base_url)) as client:
            return [event async for event in client.jobs.events(filled.ids["job_id"][0], types=["warning"])]

    assert asyncio.run(events()) == []
