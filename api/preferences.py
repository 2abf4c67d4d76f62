"""What a request prefers (`Prefer`, RFC 7240): to wait for a job's end, or not to."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Header

MAX_WAIT_SECONDS = 60

# Possessive throughout: no header, however made, takes longer than its length.
_TOKEN = r"[!#$%&'*+.^_`|~0-9A-Za-z-]++"
_VALUE = rf'(?:{_TOKEN}|"(?:[^"\\]|\\.)*+")'
_NAMED = rf"{_TOKEN}(?:\s*+=\s*+{_VALUE})?+"
_PREFERENCE = re.compile(
    rf"({_TOKEN})(?:\s*+=\s*+({_VALUE}))?+(?:\s*+;(?:\s*+{_NAMED})?+)*+\s*+(?:,|$)",
)
_SECONDS = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True)
class Preferences:
    """`wait_seconds` is none where the request does not say how long to wait; it is at most `MAX_WAIT_SECONDS`."""

    respond_async: bool = False
    wait_seconds: int | None = None

    @classmethod
    def of(cls, headers: Iterable[str]) -> "Preferences":
        """What `Prefer` headers say. What cannot be read, and what is not known, does not count."""
        found = dict(reversed([each for header in headers for each in _read(header)]))  # the first of a name counts
        wait = found.get("wait", "")
        return cls("respond-async" in found, min(MAX_WAIT_SECONDS, int(wait)) if _SECONDS.fullmatch(wait) else None)

    def applied(self, finished: bool) -> str:
        """The `Preference-Applied` of an answer that holds the finished job, or not; may be empty."""
        applied = ["respond-async"] if self.respond_async and not finished else []
        if self.wait_seconds is not None:
            applied.append(f"wait={self.wait_seconds}")
        return ", ".join(applied)


def _read(header: str) -> Iterator[tuple[str, str]]:
    """The preferences of a header, by name in lower case, up to where it cannot be read."""
    position = 0
    while position < len(header):
        if header[position] in ", \t":  # an empty element of the list
            position += 1
            continue
        found = _PREFERENCE.match(header, position)
        if found is None:
            return
        yield found[1].lower(), (found[2] or "").strip('"')
        position = found.end()


async def _preferences(
    prefer: Annotated[
        list[str] | None,
        Header(
            description=f"`wait=N`: answer 200 with the finished job if it ends within N seconds, at most "
            f"{MAX_WAIT_SECONDS}, else 202. `respond-async`: answer 202, at once where there is no `wait`. "
            "`Preference-Applied` says what was heeded."
        ),
    ] = None,
) -> Preferences:
    return Preferences.of(prefer or ())


PreferencesOf = Annotated[Preferences, Depends(_preferences)]
