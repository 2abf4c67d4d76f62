"""A service that asks for keys: the page asks for one, keeps it for itself, and forgets it."""

import re
import zipfile
from typing import Any

import httpx
import pytest

from api.client import Client, Dataset, Job
from tests.browser.conftest import Guarded
from tests.browser.pages import Open, photograph, violations

pytestmark = pytest.mark.browser


def test_a_key_is_asked_for_and_kept_out_of_every_address(open_page: Open, guarded: Guarded, trained: Job) -> None:
    page = open_page(guarded.url, provoked=("status of 401",))
    dialog = page.get_by_role("dialog", name="A key is needed")
    dialog.wait_for()
    photograph(page, "key")
    assert violations(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Enter a key").click()
    page.get_by_label("Key", exact=True).fill("flowpp_wrong")
    page.keyboard.press("Enter")
    dialog.get_by_role("alert").filter(has_text="there is no such key").wait_for()
    page.get_by_label("Key", exact=True).fill(guarded.token)
    page.keyboard.press("Enter")
    page.locator(f"#open-{trained.id}").wait_for()
    assert not dialog.is_visible()

    page.locator(f"#open-{trained.id}").click()
    page.get_by_alt_text("Samples at step 40", exact=True).wait_for()
    page.get_by_text("Events", exact=True).click()
    page.locator(".events li").filter(has_text="succeeded").wait_for()
    page.get_by_role("link", name="Checkpoints").click()
    assert trained.result is not None
    with page.expect_download() as download:
        page.locator(f"#save-{trained.result['last_checkpoint']}").click()
    assert zipfile.is_zipfile(download.value.path())
    page.reload()
    page.locator(f"#save-{trained.result['last_checkpoint']}").wait_for()

    assert not dialog.is_visible(), "the key is kept while the tab is"
    assert len(page.seen.urls) > 20
    assert not [url for url in page.seen.urls if guarded.token in url or "key" in url.lower()]
    assert guarded.token not in page.url
    assert page.evaluate("() => [document.cookie, localStorage.length]") == ["", 0]
    assert page.context.cookies() == []

    page.get_by_role("button", name="Forget the key").click()
    dialog.wait_for()
    assert page.evaluate("() => sessionStorage.length") == 0


def test_large_files_are_streamed_to_the_disk_with_the_key(open_page: Open, guarded: Guarded, trained: Job) -> None:
    """Into the origin's own file system: the dialog that asks where to is the browser's, and nobody answers it here."""
    assert trained.result is not None
    checkpoint = trained.result["best_checkpoint"]
    page = with_key(open_page(guarded.url, provoked=("status of 401",)), guarded)
    save = """async (checkpoint) => {
        const { download } = await import("./dashboard/service.js");
        const folder = await navigator.storage.getDirectory();
        window.showSaveFilePicker = ({ suggestedName }) => folder.getFileHandle(suggestedName, { create: true });
        await download(`/v1/checkpoints/${checkpoint}/download`, "saved.zip", 2 ** 30);
        const saved = await (await folder.getFileHandle("saved.zip")).getFile();
        const start = new Uint8Array(await saved.slice(0, 2).arrayBuffer());
        return [saved.size, String.fromCharCode(...start)];
    }"""
    headers = {"Authorization": f"Bearer {guarded.token}"}
    answer = httpx.get(f"{guarded.url}/v1/checkpoints/{checkpoint}/download", headers=headers, trust_env=False)
    assert page.evaluate(save, checkpoint) == [len(answer.content), "PK"]


def test_a_page_goes_on_where_it_was_when_the_service_was_killed_and_is_back(
    open_page: Open, guarded: Guarded, client: Client, dataset: Dataset
) -> None:
    provoked = ("status of 401", "ERR_CONNECTION_REFUSED", "ERR_INCOMPLETE_CHUNKED_ENCODING", "ERR_EMPTY_RESPONSE")
    page = with_key(open_page(guarded.url, provoked=provoked), guarded)
    job = client.training_jobs.create(dataset=dataset.id, model={"preset": "tiny"}, training={"steps": 1_000_000})
    page.goto(f"{guarded.url}/#/jobs/{job.id}")
    page.get_by_text("live", exact=True).wait_for()
    page.get_by_text(re.compile(r"step [1-9]")).first.wait_for()
    guarded.process.kill()
    guarded.process.wait()
    page.get_by_text("connection lost; trying again").wait_for()
    page.get_by_role("alert").filter(has_text="the service does not answer").wait_for()
    guarded.start()
    page.get_by_text("live", exact=True).wait_for()
    page.get_by_role("alert").wait_for(state="detached")
    client.jobs.cancel(job.id)
    page.locator(".badge.cancelled").wait_for()
    page.get_by_text("Events", exact=True).click()
    page.locator(".events li").filter(has_text="cancelled").wait_for()
    told = [event for event in client.jobs.events(job.id) if event.type not in ("metrics", "log")]
    assert page.locator(".events li").count() == len(told)


def with_key(page: Any, guarded: Guarded) -> Any:
    """The page, after the key was typed."""
    page.get_by_label("Key", exact=True).fill(guarded.token)
    page.keyboard.press("Enter")
    page.locator(".row").first.wait_for()
    return page
