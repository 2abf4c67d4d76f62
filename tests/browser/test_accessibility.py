"""The page for everybody: by keyboard alone, on a phone, in dark and light, and as axe-core judges it."""

import hashlib
import re
from typing import Any

import pytest

from api.client import Client, Dataset, Job
from api.stack import Stack
from tests.browser.pages import PAGES, VENDOR, Open, photograph, settled, violations

pytestmark = pytest.mark.browser

PHONE = {"viewport": {"width": 320, "height": 640}, "has_touch": True, "is_mobile": True, "device_scale_factor": 2}


def places(dataset: Dataset, trained: Job) -> list[str]:
    return [*PAGES, f"jobs/{trained.id}", f"datasets/{dataset.id}"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_on_any_page(
    open_page: Open, stack: Stack, dataset: Dataset, trained: Job, scheme: str
) -> None:
    for place in places(dataset, trained):
        page = settled(open_page(stack.url, f"#/{place}", color_scheme=scheme))
        assert violations(page) == [], place
        photograph(page, f"{scheme}-{place.split('_')[0].replace('/', '-')}")


def test_dark_and_light_are_the_readers_choice(open_page: Open, stack: Stack) -> None:
    ground = "() => getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    light, dark = (open_page(stack.url, color_scheme=scheme).evaluate(ground) for scheme in ("light", "dark"))
    assert sum(light) > 600
    assert sum(dark) < 150


def test_nothing_is_wider_than_a_phone(open_page: Open, stack: Stack, dataset: Dataset, trained: Job) -> None:
    wide = """() => [...document.querySelectorAll("body *")].filter((each) => {
        const { right, width } = each.getBoundingClientRect();
        return width && right > innerWidth + 1 && getComputedStyle(each).clipPath === "none";
    }).map((each) => each.outerHTML.slice(0, 200))"""
    for place in places(dataset, trained):
        page = settled(open_page(stack.url, f"#/{place}", **PHONE))
        photograph(page, f"phone-{place.split('_')[0].replace('/', '-')}")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 320, (place, page.evaluate(wide))


def test_a_model_is_trained_and_its_job_cancelled_by_keyboard_alone(
    open_page: Open, stack: Stack, client: Client, dataset: Dataset
) -> None:
    page = open_page(stack.url, "#/jobs")
    keys = page.keyboard
    keys.press("Tab")
    assert focused(page) == "Skip to the content"
    assert page.evaluate("() => document.activeElement.getBoundingClientRect().width") > 50, "it is seen"
    keys.press("Enter")
    assert page.evaluate("() => document.activeElement.id") == "main"
    keys.press("Shift+Tab")
    tab_to(page, "^Datasets$", "Shift+Tab")
    keys.press("Enter")
    page.locator(f"#open-{dataset.id}").wait_for()
    assert focused(page) == "Datasets", "the heading of the page that came"
    tab_to(page, f"^open-{dataset.id}$")
    keys.press("Enter")
    page.get_by_role("button", name="Start training").wait_for()
    tab_to(page, "^preset$")
    keys.type("tiny")
    tab_to(page, "^train-steps$")
    assert page.evaluate("() => getComputedStyle(document.activeElement).outlineStyle") == "solid", "focus is seen"
    keys.type("1000000")
    keys.press("Enter")
    page.locator(".badge.running").wait_for()
    job = page.url.rsplit("/", 1)[1]
    page.get_by_text(re.compile(r"step [1-9]")).first.wait_for()
    tab_to(page, "^job-cancel$")
    page.wait_for_timeout(2500)  # the state is shown anew meanwhile, more than once
    assert page.evaluate("() => document.activeElement.id") == "job-cancel", "and the focus stays"
    keys.press("Enter")
    page.locator(".badge.cancelled").wait_for()
    assert page.locator("#announcements").inner_text() == "The job is cancelled."
    assert client.jobs.get(job).status == "cancelled"


def test_arrow_keys_read_a_curve(open_page: Open, stack: Stack, trained: Job) -> None:
    page = settled(open_page(stack.url, f"#/jobs/{trained.id}"))
    page.locator(".chart").first.focus()
    for key, step in (("Home", 1), ("ArrowRight", 2), ("Shift+ArrowRight", 12), ("End", 40), ("ArrowLeft", 39)):
        page.keyboard.press(key)
        assert f"step {step}" in page.locator(".curve").first.inner_text().splitlines(), key


def test_those_who_want_less_motion_get_none(open_page: Open, stack: Stack) -> None:
    page = settled(open_page(stack.url, "#/datasets", reduced_motion="reduce"))
    moving = """() => [...document.querySelectorAll("*")]
        .filter((each) => parseFloat(getComputedStyle(each).transitionDuration)).length"""
    assert page.evaluate(moving) == 0
    assert settled(open_page(stack.url, "#/datasets")).evaluate(moving) > 0


def test_axe_is_the_file_that_the_table_names() -> None:
    rows = re.findall(r"^\| (\S+) \|.*\| ([0-9a-f]{64}) \|$", (VENDOR / "VENDORED.md").read_text(), re.MULTILINE)
    assert {name for name, _ in rows} == {path.name for path in VENDOR.iterdir()} - {"VENDORED.md"}
    for name, sha256 in rows:
        assert hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() == sha256, name


def focused(page: Any) -> str:
    return str(page.evaluate("() => document.activeElement.id || document.activeElement.innerText"))


def tab_to(page: Any, pattern: str, key: str = "Tab") -> None:
    """Presses Tab until what has the focus has this id, or text."""
    passed = []
    for _ in range(40):
        passed.append(focused(page))
        if re.search(pattern, passed[-1]):
            return
        page.keyboard.press(key)
    raise AssertionError(f"{pattern} is not reached by {key}: {passed}")
