"""Datasets and training jobs in the browser: uploaded, watched, paused, resumed, cancelled."""

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from api.client import Client, Dataset, Job
from api.stack import Stack
from tests.browser.pages import Open, colours, photograph, settled, until

pytestmark = pytest.mark.browser

ENDLESS = 1_000_000


def step(page: Any) -> int:
    """The last step that the first curve has."""
    found = re.search(r"step ([\d,]+)", page.locator(".curve").first.inner_text())
    return int(found[1].replace(",", "")) if found else 0


def until_step(page: Any, least: int) -> None:
    script = """(least) => {
        const found = /step ([\\d,]+)/.exec(document.querySelector(".curve").innerText);
        return found && Number(found[1].replace(",", "")) >= least;
    }"""
    until(page, script, least)


def test_one_uploads_images_trains_on_them_watches_pauses_and_resumes(
    open_page: Open, stack: Stack, client: Client, archive: Path
) -> None:
    page = open_page(stack.url, "#/datasets")
    page.get_by_label("Upload a dataset").set_input_files(archive)
    page.get_by_text("Uploaded 100 images, 20 of them for validation.").wait_for()
    [uploaded] = [each for each in client.datasets.list() if each.name == archive.name][:1]
    page.locator(f"#open-{uploaded.id}").click()
    page.get_by_label("Preset").select_option("tiny")
    for label, value in (("Steps", 900), ("Validate every", 20), ("Draw samples every", 50), ("Checkpoint every", 50)):
        page.get_by_label(label, exact=True).fill(str(value))
    photograph(settled(page), "dataset")
    page.get_by_role("button", name="Start training").click()

    page.locator(".badge.running").wait_for()
    until_step(page, 30)
    before = step(page)
    until_step(page, before + 30)
    page.get_by_text("live", exact=True).wait_for()
    for curve in range(3):
        assert len(colours(page, f".curve >> nth={curve} >> canvas")) > 10, "the curve is drawn"
    slider = page.get_by_label("Samples at step")
    until(page, "() => document.getElementById('sample-step').max >= 1")
    assert page.locator(".samples img").evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [64, 64]

    page.get_by_role("button", name="Pause").click()
    page.locator(".badge.paused").wait_for()
    rested = step(page)
    newest = page.locator(".samples img").get_attribute("alt")
    slider.focus()
    page.keyboard.press("Home")
    page.get_by_alt_text("Samples at step 50", exact=True).wait_for()
    assert newest != "Samples at step 50"
    page.keyboard.press("End")
    page.get_by_alt_text(newest, exact=True).wait_for()
    photograph(page, "job-paused")

    page.get_by_role("button", name="Resume").click()
    until_step(page, rested + 50)
    photograph(page, "job-running")
    page.locator(".badge.succeeded").wait_for()
    page.get_by_alt_text("Samples at step 900", exact=True).wait_for()
    events = page.locator(".events")
    assert "paused" in events.inner_text() or not events.is_visible()
    job_id = page.url.rsplit("/", 1)[1]
    columns = client.jobs.metrics(job_id).columns
    drawn = page.locator(".curve").first.inner_text()
    last = [value for value in columns["validation_bits_per_dim"] if value is not None][-1]
    assert f"validation {last:.4g}"[:15] in drawn
    assert "step 900" in drawn
    photograph(settled(page), "job-succeeded")


def test_an_upload_tells_how_much_of_it_is_sent(open_page: Open, stack: Stack, tmp_path: Path) -> None:
    np.save(tmp_path / "noise.npy", np.random.default_rng(1).integers(0, 256, (500, 32, 32, 3), np.uint8))
    page = open_page(stack.url, "#/datasets")
    files = page.get_by_label("Upload a dataset")
    files.wait_for()
    slow = {"offline": False, "latency": 0, "downloadThroughput": -1, "uploadThroughput": 500_000}
    page.context.new_cdp_session(page).send("Network.emulateNetworkConditions", slow)
    files.set_input_files(tmp_path / "noise.npy")
    page.get_by_text(re.compile(r"^[1-9]\d? % sent")).wait_for()
    assert 0 < page.get_by_role("progressbar", name="Upload").evaluate("(bar) => bar.value") < 1
    page.get_by_text("Uploaded 500 images, 50 of them for validation.").wait_for()


def test_a_running_job_is_cancelled_and_says_so(
    open_page: Open, stack: Stack, client: Client, dataset: Dataset
) -> None:
    job = client.training_jobs.create(dataset=dataset.id, model={"preset": "tiny"}, training={"steps": ENDLESS})
    page = open_page(stack.url, f"#/jobs/{job.id}")
    page.locator(".badge.running").wait_for()
    page.get_by_role("button", name="Cancel").click()
    page.locator(".badge.cancelled").wait_for()
    assert page.get_by_role("button", name=re.compile("^(Pause|Resume|Cancel)$")).count() == 0
    page.get_by_text("Events", exact=True).click()
    page.locator(".events li").filter(has_text="cancelled").wait_for()
    assert client.jobs.get(job.id).status == "cancelled"


def test_the_list_of_jobs_follows_their_states_and_is_filtered_and_paged(
    open_page: Open, stack: Stack, client: Client, dataset: Dataset, trained: Job
) -> None:
    for seed in range(21):
        client.sampling_jobs.create(model=trained.id, num_samples=1, seed=seed)
    page = open_page(stack.url, "#/jobs")
    page.get_by_label("Type").select_option("training")
    page.locator(f"#open-{trained.id}").wait_for()
    assert "sampling" not in page.locator(".list").inner_text()
    job = client.training_jobs.create(dataset=dataset.id, model={"preset": "tiny"}, training={"steps": ENDLESS})
    row = page.locator(".row", has=page.locator(f"#open-{job.id}"))
    row.locator(".badge.running").wait_for()
    row.get_by_text("left").wait_for()
    photograph(page, "jobs")
    client.jobs.cancel(job.id)
    row.locator(".badge.cancelled").wait_for()
    page.get_by_label("State").select_option("succeeded")
    row.wait_for(state="detached")
    page.get_by_label("Type").select_option("sampling")
    page.get_by_text("Older").click()
    page.get_by_text("Newest").wait_for()
    until(page, "() => document.querySelectorAll('.row').length && document.querySelectorAll('.row').length < 20")


def test_a_broken_stream_goes_on_behind_the_last_event_and_tells_nothing_twice(
    open_page: Open, stack: Stack, client: Client, trained: Job
) -> None:
    events = list(client.jobs.events(trained.id))
    half = events[: len(events) // 2]
    asked: list[str | None] = []

    def cut(route: Any) -> None:
        asked.append(route.request.headers.get("last-event-id"))
        if len(asked) > 1:
            route.continue_()
            return
        said = "".join(
            f"id: {each.id}\nevent: {each.type}\ndata: {json.dumps(each.model_dump(mode='json'))}\n\n" for each in half
        )
        route.fulfill(body=said, content_type="text/event-stream")

    page = open_page(stack.url, "#/datasets")
    page.route("**/events", cut)
    page.goto(f"{stack.url}/#/jobs/{trained.id}")
    page.get_by_text("Events", exact=True).click()
    page.locator(".events li").filter(has_text="succeeded").wait_for()
    assert asked == [None, half[-1].id]
    told = [each for each in events if each.type not in ("metrics", "log")]
    assert page.locator(".events li").count() == len(told)


def test_what_the_service_refuses_is_shown_in_its_words(open_page: Open, stack: Stack, dataset: Dataset) -> None:
    page = open_page(stack.url, f"#/datasets/{dataset.id}", provoked=("status of 404", "status of 422"))
    page.get_by_label("Preset").select_option("tiny")
    page.get_by_label("Learning rate").fill("3")
    page.get_by_role("button", name="Start training").click()
    page.get_by_role("alert").filter(
        has_text="training.learning_rate: Input should be less than or equal to 1"
    ).wait_for()
    page.goto(f"{stack.url}/#/jobs/job_nobody")
    page.get_by_role("alert").filter(has_text="there is no job job_nobody").wait_for()
    page.goto(f"{stack.url}/#/datasets")
    page.get_by_label("Upload a dataset").set_input_files({"name": "a.zip", "mimeType": "", "buffer": b"no archive"})
    page.get_by_role("alert").wait_for()


def test_a_dataset_shows_its_contact_sheet(open_page: Open, stack: Stack, dataset: Dataset) -> None:
    page = open_page(stack.url, f"#/datasets/{dataset.id}")
    sheet = page.get_by_alt_text("Contact sheet: some of the dataset's images")
    assert sheet.evaluate("(image) => [image.naturalWidth, image.naturalHeight]") == [8 * 18, 8 * 18]
