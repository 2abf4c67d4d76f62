"""The dashboard's files over HTTP: what browsers are told of them, and that all there is, is served and packaged."""

import hashlib
import re
import zipfile
from pathlib import Path

import httpx
import pytest
from hatchling.builders.wheel import WheelBuilder

ROOT = Path(__file__).parents[2]
DASHBOARD = ROOT / "api" / "dashboard"
FILES = sorted(path.relative_to(DASHBOARD).as_posix() for path in DASHBOARD.rglob("*") if path.is_file())


def test_the_page_is_served_at_the_root_under_a_policy_without_inline_code(http: httpx.Client) -> None:
    page = http.get("/")
    assert page.status_code == 200
    assert page.content == (DASHBOARD / "index.html").read_bytes()
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = dict(part.strip().split(" ", 1) for part in page.headers["content-security-policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == policy["base-uri"] == policy["form-action"] == "'none'"
    assert "unsafe" not in page.headers["content-security-policy"]
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["referrer-policy"] == "no-referrer"
    assert "set-cookie" not in page.headers
    assert not re.search(r"<script(?![^>]* src=)|<style|\son\w+=|\sstyle=", page.text), "nothing inline"


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("app.js", "text/javascript; charset=utf-8"),
        ("style.css", "text/css; charset=utf-8"),
        ("icon.svg", "image/svg+xml"),
        ("vendor/uPlot.esm.js", "text/javascript; charset=utf-8"),
        ("vendor/uPlot.LICENSE.txt", "text/plain; charset=utf-8"),
    ],
)
def test_its_files_are_served_with_their_media_types(http: httpx.Client, name: str, media_type: str) -> None:
    answer = http.get(f"/dashboard/{name}")
    assert answer.headers["content-type"] == media_type
    assert answer.content == (DASHBOARD / name).read_bytes()
    head = http.head(f"/dashboard/{name}")
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-length"] == str(len(answer.content))


def test_a_file_that_the_browser_has_is_not_sent_again(http: httpx.Client) -> None:
    first = http.get("/dashboard/app.js")
    assert first.headers["cache-control"] == "no-cache"
    again = http.get("/dashboard/app.js", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")
    assert http.get("/dashboard/app.js", headers={"If-None-Match": '"other"'}).status_code == 200


def test_nothing_but_the_dashboards_files_is_served_beside_it(http: httpx.Client) -> None:
    for path in (
        "/dashboard/nothing.js",
        "/dashboard/%2e%2e/app.py",
        "/dashboard/../auth.py",
        "/dashboard/",
        "/dashboard//etc/passwd",
    ):
        answer = http.get(path)
        assert answer.status_code == 404, path
        assert answer.json()["code"] == "not_found"
    assert http.post("/").status_code == 405


def test_the_page_asks_for_no_other_server_and_all_that_it_imports_is_there(http: httpx.Client) -> None:
    for name in FILES:
        if name.startswith("vendor/"):
            continue
        text = (DASHBOARD / name).read_text()
        assert set(re.findall(r"(?:https?:)?//[\w.]+", re.sub(r"(?m)^\s*//.*", "", text))) <= {"http://www.w3.org"}, (
            name
        )
        for imported in re.findall(r'from "\./(.+?)"', text):
            assert http.get(f"/dashboard/{imported}").status_code == 200, (name, imported)


def test_what_is_vendored_is_what_the_table_says() -> None:
    vendor = DASHBOARD / "vendor"
    rows = re.findall(r"^\| (\S+) \|.*\| ([0-9a-f]{64}) \|$", (vendor / "VENDORED.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in vendor.iterdir()} - {"VENDORED.md"}
    for name, sha256 in rows:
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == sha256, name


def test_the_wheel_holds_every_file_of_it(tmp_path: Path) -> None:
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    packaged = zipfile.ZipFile(wheel).namelist()
    assert {f"api/dashboard/{name}" for name in FILES} <= set(packaged)
