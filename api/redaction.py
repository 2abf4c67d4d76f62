"""Keys, kept out of logs and answers, wherever they were sent by mistake."""

import logging
import re

_TOKEN = re.compile(r"flowpp_[0-9A-Za-z]{24}_[0-9A-Za-z_-]+")


def redacted(text: str) -> str:
    """`text` without the secrets of keys."""
    return _TOKEN.sub(lambda found: found[0][:31] + "_...", text)


def without_queries(record: logging.LogRecord) -> bool:
    """A filter of uvicorn's access log: paths without their queries, where secrets are sent by mistake."""
    if isinstance(record.args, tuple) and len(record.args) == 5:
        client, method, path, version, status = record.args
        record.args = (client, method, redacted(str(path).partition("?")[0]), version, status)
    return True


def install() -> None:
    """Adds the filter, once."""
    logging.getLogger("uvicorn.access").addFilter(without_queries)
