"""A page in Chromium: what it has asked for, what went wrong on it, and pictures of it."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
OUTPUT = ROOT / "browser_output"
"""Screenshots of the last run."""

PAGES = ("jobs", "datasets", "checkpoints", "score", "sample")

Open = Callable[..., Any]
"""Opens the page of a service, as open_page(url, "#/jobs"); Playwright's `Page`."""


@dataclass
class Seen:
    """What a page has asked for, and what went wrong on it."""

    urls: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    refusals: tuple[int, ...] = ()
    """Statuses that a test provokes, which browsers count among the errors."""

    def listen(self, page: Any) -> None:
        page.on("request", lambda request: self.urls.append(request.url))
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.faults.append(str(error)))

    def _note(self, message: Any) -> None:
        """Errors and warnings; content that the policy refuses is among them."""
        where, text = message.location["url"], message.text
        provoked = any(f"status of {status} " in text for status in self.refusals)
        if message.type in ("error", "warning") and not provoked:
            self.faults.append(f"{text} ({where})")


def settled(page: Any) -> Any:
    """The page, when nothing of it is still to come but what is asked for every so often."""
    until(
        page, "() => document.querySelector('.page')?.children.length && [...document.images].every((i) => i.complete)"
    )
    page.wait_for_timeout(300)
    return page


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
