"""Nothing that a client sends makes the service answer 500: not a header, a query, a path, a body or a file's name."""

import json
import socket
from pathlib import Path

import httpx
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flowpp.config import DequantizerConfig, ModelConfig, TrainingConfig
from flowpp.data import encode_png
from tests.api.conftest import Filled, Serve, low_limits
from worker.redis_server import RedisServer

PNG = encode_png(np.zeros((32, 32, 3), np.uint8))
FORM = b"multipart/form-data; boundary=B"

Headers = list[tuple[bytes, bytes]]


class Odd:
    """Sends bytes to a service that has some of everything, without an HTTP client."""

    def __init__(self, port: int, ids: dict[str, list[str]]) -> None:
        self.port, self.ids = port, ids
        job, dataset, checkpoint = (ids[name][-1].encode() for name in ("job_id", "dataset_id", "checkpoint_id"))
        self.paths = [
            b"/v1/jobs", b"/v1/jobs/" + job + b"/events", b"/v1/jobs/" + job + b"/artifacts/result.bin",
            b"/v1/datasets/" + dataset + b"/contact-sheet", b"/v1/checkpoints/" + checkpoint + b"/download",
            b"/v1/nothing", b"/metrics", b"/", b"/docs/errors",
        ]  # fmt: skip

    def send(
        self,
        path: bytes,
        headers: Headers | None = None,
        method: bytes = b"GET",
        body: bytes = b"",
        host: bytes = b"localhost",
    ) -> tuple[int, bytes]:
        """Status and body of the answer."""
        lines = [(b"Host", host), *(headers or ()), (b"Connection", b"close")]
        if body:
            lines.append((b"Content-Length", str(len(body)).encode()))
        head = b"".join(name + b": " + value + b"\r\n" for name, value in lines)
        with socket.create_connection(("127.0.0.1", self.port), timeout=60) as connection:
            connection.sendall(method + b" " + path + b" HTTP/1.1\r\n" + head + b"\r\n" + body)
            answer = b"".join(iter(lambda: connection.recv(2**16), b""))
        status, _, content = answer.partition(b"\r\n\r\n")
        return int(status.split()[1]), content

    def refuse_or_answer(self, path: bytes, *args: object, **more: object) -> int:
        """The status, which is not 500; a refusal that is ours has a code and a sentence."""
        status, content = self.send(path, *args, **more)  # type: ignore[arg-type]
        assert status < 500, (path, args, more, content)
        if status >= 400 and content.startswith(b"{"):
            problem = json.loads(content)
            assert problem["code"] != "internal_error"
            assert problem["detail"]
        return status

    def post(
        self, path: bytes, body: bytes, content_type: bytes = b"application/json", headers: Headers | None = None
    ) -> int:
        return self.refuse_or_answer(path, [(b"Content-Type", content_type), *(headers or ())], b"POST", body)


@pytest.fixture(scope="module")
def odd(filled: Filled) -> Odd:
    return Odd(filled.client.base_url.port or 0, filled.ids)


ODD = [
    b"", b"[::1", b"[", b"]", b"[]", b"a:b:c", b":99999", b"x:-1", b"localhost:x", b"localhost:1e9",
    "localhost:\uff11".encode(), b"\xff\xfe", b"%00", b"a" * 10_000, b"xn--a", b"xn--\xff", b"null", b"http://[",
    b"http://a:99999999", b"http://[v1.x]", b"http://[::1%25]", "http://\u2121.com".encode(), "http://a\u207bb".encode(),
    b"http://u:p@ss@[::1]:80:80/", b"9" * 5_000, b"-1", b"1e999", b"NaN", b"9999999999999d", "\uff11d".encode(),
    "wait=\uff11".encode(), b"wait=1e999", b"wait=" + b"9" * 5_000, b"bytes=-", b"bytes=0-" + b"9" * 30,
    "bytes=\u0661-".encode(), b"bytes=9-1,3-2,-", b"Wed, 21 Oct 99999 07:28:00 GMT", b"Wed, 00 Foo 0000 99:99:99 +9999",
    b"00-x-y-z", b"00-" + b"f" * 32 + b"-" + b"0" * 16 + b"-zz", b'"', b'W/"', b'"\\', b"*", b"text/event-stream",
    b"text/event-stream;q=x", b"application/json; charset=bogus", FORM + b"; charset=undefined",
    b"multipart/form-data; boundary=", b"multipart/form-data; boundary=\xff", b"Bearer \xff\xfe", b"Bearer",
    b"Basic x", b"flowpp_\xff", b"a\tb", b"=?utf-8?b?x?=", b"0-0", b"18446744073709551616-0",
    b"9999999999999999999-9999999999999999999", b"\xed\xa0\x80", b"a,b;c=d", "\u0661-\u0662".encode(),
    b"gzip, identity", b"cross-site", b"\xf0\x9f\x98\x80",
]  # fmt: skip
HEADERS = [
    b"Accept", b"Accept-Encoding", b"Accept-Language", b"Authorization", b"Cancel-After", b"Content-Disposition",
    b"Content-Encoding", b"Content-Type", b"Cookie", b"Expect", b"Forwarded", b"Idempotency-Key", b"If-Match",
    b"If-Modified-Since", b"If-None-Match", b"If-Range", b"If-Unmodified-Since", b"Last-Event-ID", b"Origin",
    b"Prefer", b"Range", b"Referer", b"Sec-Fetch-Mode", b"Sec-Fetch-Site", b"TE", b"traceparent", b"tracestate",
    b"Upgrade", b"User-Agent", b"X-Forwarded-For", b"X-Forwarded-Host", b"X-Forwarded-Proto",
    b"X-HTTP-Method-Override", b"X-Request-ID",
]  # fmt: skip
POSTS = [b"training-jobs", b"likelihood-jobs", b"sampling-jobs", b"datasets", b"checkpoints", b"webhooks"]


@pytest.mark.parametrize("header", HEADERS)
def test_no_value_of_a_header_is_answered_by_500(header: bytes, odd: Odd) -> None:
    for index, value in enumerate(ODD):  # a path each, and each path often: all of them would take minutes
        odd.refuse_or_answer(odd.paths[index % len(odd.paths)], [(header, value)])
        odd.refuse_or_answer(odd.paths[1], [(header, value), (b"Accept", b"text/event-stream")])
        for path in POSTS[index % 3 :: 3]:
            content_type = [] if header == b"Content-Type" else [(b"Content-Type", b"application/json")]
            odd.refuse_or_answer(b"/v1/" + path, [(header, value), *content_type], b"POST", b'{"url": "x"}')


LENGTHS = [
    b"-1", b"+1", b"1e3", b"0x1", "\uff11".encode(), b"9" * 5_000, b"1, 2", b"gzip, chunked", b"identity", b"\xff", b"",
]  # fmt: skip


@pytest.mark.parametrize("header", [b"Content-Length", b"Transfer-Encoding"])
def test_no_length_or_transfer_coding_is_answered_by_500(header: bytes, odd: Odd) -> None:
    for value in LENGTHS:
        odd.refuse_or_answer(b"/v1/webhooks", [(header, value), (b"Content-Type", b"application/json")], b"POST")


def test_no_host_is_answered_by_500(odd: Odd) -> None:
    for value in ODD:
        for path in odd.paths[::3]:
            odd.refuse_or_answer(path, host=value)
    for value in (b"[::1", b"[", b"a:b:c", b"xn--a", b"evil.example", b"http://localhost", b"[v1.x]"):
        assert odd.send(b"/v1/jobs", host=value)[0] in (400, 403), "another name than this machine's"
    for value in (b"localhost", b"127.0.0.1:80", b"[::1]:8000", b"a.localhost", b"LOCALHOST"):
        assert odd.send(b"/v1/jobs", host=value)[0] == 200


QUERIES = [
    "limit=\uff11".encode(), b"limit=%EF%BC%91", b"limit=" + b"9" * 5_000, b"limit=1e3", b"limit=%00", b"limit=NaN",
    b"limit=1_0", b"after=%ED%A0%80", b"after=%ff", b"after=\xff", b"after=%F0%9F%98%80", b"after=" + b"9" * 128,
    b"after=1-99999999999999999999", b"\xff=1", b"%ff=1", b"metadata[%ff]=%ED%A0%80", b"metadata[a]=%00",
    b"metadata[a]=\xff", b"metadata[", b"metadata[]=x", b"metadata[a]]=x", b"metadata=x", b"limit=1&limit=2",
    b"order=%00", b"=", b"&&&", b"a=1&" * 2_000, b"[", b"type=%ED%A0%80", b"type=,,", b"type=status&type=%ff",
    b"status=\x80", b"job=%00", b"job=%ED%A0%80", b"if_none_match=x", b"%", b"%zz",
]  # fmt: skip


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: ascii(query[:40]))
def test_no_query_is_answered_by_500(query: bytes, odd: Odd) -> None:
    for path in [*odd.paths, b"/v1/datasets", b"/v1/checkpoints", b"/v1/webhooks", b"/v1/status", b"/healthz"]:
        odd.refuse_or_answer(path + b"?" + query)


PARTS = [
    b"%ff", b"%00", b"%ED%A0%80", b"..", b"%2e%2e", b"a%2Fb", b"\xff", b"\xc3\xa9", b"a" * 5_000, b"*", b"[",
    b"{x}", b"%", b"%zz", b"a;b", b"a\\b", b"%0d%0aX:1", b"\x7f", b"//[::1", b"ds_%00",
]  # fmt: skip


@pytest.mark.parametrize("part", PARTS, ids=lambda part: ascii(part[:40]))
def test_no_path_is_answered_by_500(part: bytes, odd: Odd) -> None:
    for folder in (b"jobs/", b"datasets/", b"checkpoints/", b"webhooks/", b""):
        for method in (b"GET", b"HEAD", b"DELETE", b"POST", b"OPTIONS", b"TRACE", b"FOO"):
            odd.refuse_or_answer(b"/v1/" + folder + part, method=method)
        odd.refuse_or_answer(b"/v1/" + folder + part + b"/events")
    odd.refuse_or_answer(b"/dashboard/" + part)
    odd.refuse_or_answer(b"/" + part)
    odd.refuse_or_answer(b"http://localhost/" + part)


VALUES = [
    '"\\ud800"', '"\\u0000"', '"\\ud83d\\ude00"', "1e400", "-1e400", "NaN", "-Infinity", "9" * 4_000, "9" * 5_000,
    "1.5", "-1", "1e3", "1e-400", "true", "null", "[]", "{}", '""', '"\uff11"', '"' + "x" * 100 + '"',
    '{"a": "\\ud800"}', '{"\\ud800": "a"}', '{"a": "\\u0000"}', '{"": "a"}', '["\\ud800"]', "[1, 2, 3]",
    "18446744073709551616",
    "[" * 900 + "]" * 900, '{"step": 1e308}', '{"a": 1, "a": 1}', '{"\\ud800": 1, "\\ud800": 1}',
]  # fmt: skip


def test_no_json_value_is_answered_by_500(odd: Odd) -> None:
    dataset, model = odd.ids["dataset"][0], odd.ids["model"][0]
    bodies = {
        "webhooks": ({"url": "http://127.0.0.1:9/"}, ["url", "events", "x", "\ud800"]),
        "training-jobs": (
            {"dataset": dataset, "model": {"preset": "tiny"}, "training": {"steps": 5}},
            ["dataset", "model", "training", "resume_from", "metadata"],
        ),
        "likelihood-jobs": (
            {"model": model, "dataset": dataset},
            ["model", "dataset", "importance_samples", "bits_map", "seed", "metadata"],
        ),
        "sampling-jobs": ({"model": model}, ["model", "num_samples", "temperature", "between", "seed", "metadata"]),
    }
    for path, (right, names) in bodies.items():
        for name in names:
            others = {key: value for key, value in right.items() if key != name}
            for value in VALUES:
                odd.post(
                    f"/v1/{path}".encode(), (json.dumps(others)[:-1] + f", {json.dumps(name)}: {value}}}").encode()
                )


@pytest.mark.parametrize("group", ["model", "training", "dequantizer"])
def test_no_json_value_of_a_hyperparameter_is_answered_by_500(group: str, odd: Odd) -> None:
    fields = {"model": ModelConfig, "training": TrainingConfig, "dequantizer": DequantizerConfig}[group].model_fields
    form = {
        "model": '{"dataset": "%s", "model": {"preset": "tiny", "%s": %s}}',
        "training": '{"dataset": "%s", "model": {"preset": "tiny"}, "training": {"%s": %s}}',
        "dequantizer": '{"dataset": "%s", "model": {"preset": "tiny", "dequantizer": {"%s": %s}}}',
    }[group]
    for name in fields:
        for value in VALUES:
            odd.post(b"/v1/training-jobs", (form % (odd.ids["dataset"][0], name, value)).encode())


URLS = [
    "http://[::1", "http://[", "http://]", "http://[::1]x", "http://[v1.x]", "http://[fe80::1%lo]",
    "http://[::1.2.3.4.5]", "http://" + "a" * 64 + ".com", "http://" + ".".join(["a" * 60] * 5), "http://a..b",
    "http://.", "http://..", "http://\u2024", "http://a\u2024b.com", "http://x:0", "http://x:65536",
    "http://x:" + "9" * 5_000, "http://x:\uff11", "http://x:-1", "http://u:p@x", "http://1.1.1.1.1",
    "http://256.1.1.1", "http://0x100000000", "http://\u0660.1.1.1", "http://a\u200bb.com", "http://\u200b",
    "http://xn--a", "http://xn--.com", "http://xn--\u00e9", "http://xn--" + "9" * 59 + ".com", "http://a.xn--0",
    "http://XN--A", "http://\u00df.invalid", "http://\U0001f600.invalid", "http://a\x00b", "http://a%00b",
    "http://%ff", "http://a\ud800b", "http://\u202e.com", "http://a\u05d0.com", "http://a" + "\u0301" * 100,
    "http://-a-.invalid", "http://*.com", "http://x/\ud800", "http://x/?\x00", "http:///x", "http:x",
    "http://a b", "//[", "",
]  # fmt: skip


@pytest.mark.parametrize("url", URLS, ids=lambda url: ascii(url[:40]))
def test_no_url_of_a_webhook_is_answered_by_500(url: str, odd: Odd) -> None:
    assert odd.post(b"/v1/webhooks", json.dumps({"url": url}).encode()) == 422


def part(head: bytes, content: bytes) -> bytes:
    return b"--B\r\n" + head + b"\r\n\r\n" + content + b"\r\n"


@pytest.mark.parametrize(
    "charset",
    [
        b"",
        b"; charset=utf-16",
        b"; charset=undefined",
        b"; charset=idna",
        b"; charset=hex",
        b"; charset=unicode_escape",
        b"; charset=\x00",
        b"; charset=\xff",
    ],
)
def test_no_form_is_answered_by_500(charset: bytes, odd: Odd) -> None:
    disposition = b"Content-Disposition: form-data; "
    heads = [
        *(disposition + b'name="files"; filename="' + name + b'"' for name in FILE_NAMES),
        *(
            disposition + b"name=files; filename*=" + name
            for name in (b"", b"utf-8'", b"utf-8''%ff", b"bogus''a", b"hex'x'%E7")
        ),
        disposition + b"filename=x",
        disposition + b"name=files; filename*0=a; filename*" + b"9" * 5_000 + b"=b",
        disposition + b'name="files"; name="model"; filename="x"',
        b"Content-Disposition: form-data",
        b"Content-Disposition: \xff",
        b"Content-Disposition",
        b"Content-Type: text/plain",
        b"\xff: x",
    ]
    model = part(disposition + b'name="model"', odd.ids["model"][0].encode())
    for head in heads:
        body = part(head, PNG) + b"--B--\r\n"
        odd.post(b"/v1/likelihood-jobs", model + body, FORM + charset)
        odd.post(b"/v1/datasets", body.replace(b"files", b"file"), FORM + charset)
        odd.post(b"/v1/checkpoints", body.replace(b"files", b"file"), FORM + charset)
    image = part(disposition + b'name="files"; filename="a.png"', PNG)
    for name in (
        b"seed",
        b"importance_samples",
        b"bits_map",
        b"metadata[\xff]",
        b"metadata[\x00]",
        b"metadata",
        b"files",
        b"x",
    ):
        for value in (
            b"\xff",
            b"\x00",
            b"\xed\xa0\x80",
            "\uff11".encode(),
            b"9" * 5_000,
            b"NaN",
            b"1e999",
            b"",
            b"\xef\xbb\xbf1",
        ):
            text = part(disposition + b'name="' + name + b'"', value)
            odd.post(b"/v1/likelihood-jobs", model + text + image + b"--B--\r\n", FORM + charset)


FILE_NAMES = [
    b"a\xff.png", "画.png".encode(), b"", b"%22", b'\\"', b"a\x00b", b"a\tb", b"..", b".", b"/", b"\\", b"x" * 5_000,
    b"\xed\xa0\x80", b"\xe2\x80\xae.png", b"a/b.png", b"C:\\x\\a.png", b"CON", b"=?utf-8?b?44OH?=",
    b"=?bogus?b?!!?=", b"=?undefined?q?x?=", b"~", b"*", "画".encode() * 200, b"/" * 300, b"\xf0\x9f\x98\x80" * 80,
]  # fmt: skip

TOKEN = st.text("abcABC-_[]", min_size=1, max_size=12).map(str.encode)
# no CR, LF and NUL, which end a header, or the request
VALUE = st.binary(max_size=60).map(lambda value: bytes(byte for byte in value if byte not in b"\r\n\0").strip())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from(HEADERS[2:]), VALUE), max_size=4), st.data())
def test_no_headers_together_are_answered_by_500(odd: Odd, headers: Headers, data: st.DataObject) -> None:
    odd.refuse_or_answer(data.draw(st.sampled_from(odd.paths)), headers)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.lists(
        st.tuples(
            st.sampled_from([b"limit", b"after", b"order", b"type", b"status", b"job", b"metadata[a]"]) | TOKEN,
            st.text(max_size=20).map(lambda text: text.encode("utf-8", "surrogatepass")) | st.binary(max_size=20),
        ),
        max_size=4,
    ),
    st.data(),
)
def test_no_parameters_together_are_answered_by_500(
    odd: Odd, parameters: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    escaped = [name + b"=" + b"".join(b"%%%02X" % byte for byte in value) for name, value in parameters]
    odd.refuse_or_answer(data.draw(st.sampled_from(odd.paths)) + b"?" + b"&".join(escaped))


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=80) | st.text(max_size=40).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_no_name_of_a_file_is_answered_by_500(odd: Odd, name: bytes) -> None:
    head = (
        b'Content-Disposition: form-data; name="file"; filename="' + name.replace(b"\r", b"").replace(b"\n", b"") + b'"'
    )
    odd.post(b"/v1/datasets", part(head, PNG) + b"--B--\r\n", FORM)


def test_the_same_holds_with_authentication(serve: Serve, redis_server: RedisServer, tmp_path: Path) -> None:
    limits = low_limits(redis_server, tmp_path).model_copy(update={"authentication": True})
    with serve(limits) as client:
        service = Odd(client.base_url.port or 0, {name: ["x"] for name in ("job_id", "dataset_id", "checkpoint_id")})
        for value in ODD:
            for header in (b"Authorization", b"Host", b"Origin"):
                service.refuse_or_answer(b"/v1/jobs", [(header, value)])
                service.refuse_or_answer(b"/v1/jobs", [(b"Authorization", b"Bearer " + value), (header, value)])


def test_what_is_answered_otherwise_stays_right(odd: Odd) -> None:
    """The table above would also pass if everything were refused."""
    assert odd.send(b"/v1/jobs?limit=3&order=asc&metadata[a]=%F0%9F%98%80")[0] == 200
    assert odd.send(odd.paths[2], [(b"Range", b"bytes=0-1")])[0] == 206
    url = f"http://127.0.0.1:{odd.port}/v1/jobs"
    assert httpx.get(url, headers={"Origin": "http://localhost:3000"}, trust_env=False).status_code == 200
