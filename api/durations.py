"""Durations as users write them: `90`, `90s`, `5m`, `2h`, `1d`, `1h30m`."""

import re

LEAST_SECONDS = 5
MOST_SECONDS = 30 * 86_400

FORMS = "a number of seconds, or with units as 90s, 5m, 2h, 1d or 1h30m; at least 5 seconds and at most 30 days"

_DURATION = re.compile(r"(?:(\d{1,7})d)?(?:(\d{1,7})h)?(?:(\d{1,7})m)?(?:(\d{1,7})s?)?", re.IGNORECASE | re.ASCII)


def seconds_of(duration: str) -> int | None:
    """Returns the seconds of a duration, or None if it has another form or is out of bounds."""
    found = _DURATION.fullmatch(duration.strip())
    if found is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    total = 86_400 * days + 3_600 * hours + 60 * minutes + seconds
    return total if LEAST_SECONDS <= total <= MOST_SECONDS else None
