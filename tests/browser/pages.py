"""A page in Chromium: what it has asked for, what went wrong on it, and pictures of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "browser_output"
"""Screenshots of the last run."""

VENDOR = Path(__file__).parent / "vendor"

PAGES = ("jobs", "datasets", "checkpoints", "score", "sample")

Open = Callable[..., Any]
"""Opens the page of a service, as open_page(url, "#/jobs"); Playwright's `Page`."""


@dataclass
class Seen:
    """What a page has asked for, and what went wrong on it."""

    urls: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    provoked: tuple[str, ...] = ()
    """Of messages that a test brings about: browsers count the refusal of a request among the errors."""

    def listen(self, page: Any) -> None:
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.faults.append(str(error)))

    def _note(self, message: Any) -> None:
        """Errors and warnings; content that the policy refuses is among them."""
        is_fault = message.type in ("error", "warning")
        if is_fault and not any(each in message.text for each in self.provoked):
            self.faults.append(f"{message.text} ({message.location['url']})")


def settled(page: Any) -> Any:
    """The page, when nothing of it is still to come but what is asked for every so often."""
    until(
        page, "() => document.querySelector('.page')?.children.length && [...document.images].every((i) => i.complete)"
    )
    page.wait_for_timeout(300)
    return page


def violations(page: Any) -> list[tuple[str, list[str]]]:
    """What axe-core finds wrong on the page as it is: rules, and the elements that break them."""
    page.evaluate(f"() => {{ {(VENDOR / 'axe.min.js').read_text()} }}")
    found = page.evaluate("async () => (await axe.run()).violations")
    return [(each["id"], [node["html"] for node in each["nodes"]]) for each in found]


def photograph(page: Any, name: str) -> None:
    page.screenshot(path=OUTPUT / f"{name}.png", full_page=True)


def colours(page: Any, canvas: str) -> list[list[int]]:
    """The different colours on a canvas, [r, g, b, a] each."""
    script = """(canvas) => {
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const found = new Set();
        for (let i = 0; i < data.length; i += 4) found.add(data.slice(i, i + 4).join());
        return [...found].map((each) => each.split(",").map(Number));
    }"""
    return page.locator(canvas).first.evaluate(script)


def until(page: Any, condition: str, argument: Any = None, seconds: float = 60) -> None:
    """Returns when a function of JavaScript holds; Playwright's own wait needs what the page's policy forbids."""
    deadline = time.monotonic() + seconds
    while not page.evaluate(condition, argument):
        assert time.monotonic() < deadline, (condition, argument, page.locator("main").inner_text())
        page.wait_for_timeout(100)
