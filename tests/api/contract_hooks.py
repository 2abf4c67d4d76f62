"""What schemathesis is told of our service: which ids there are, so that half of what it sends finds something."""

import json
import os
import random
from typing import Any

import schemathesis

KNOWN: dict[str, list[str]] = json.loads(os.environ["FLOWPP_CONTRACT_IDS"])
"""Values by the name of the path parameter, or of the field of a body."""

NOWHERE = "http://127.0.0.1:9/"


@schemathesis.hook
def map_path_parameters(context: Any, path_parameters: dict[str, Any]) -> dict[str, Any]:
    return _known(path_parameters)


@schemathesis.hook
def map_body(context: Any, body: Any) -> Any:
    return _known(body) if isinstance(body, dict) else body


@schemathesis.hook
def before_call(context: Any, case: Any, kwargs: dict[str, Any]) -> None:
    """Webhooks lead to where nobody listens, and never out of this machine."""
    if isinstance(case.body, dict) and "://" in str(case.body.get("url"))[:12]:
        case.body["url"] = NOWHERE


@schemathesis.hook
def filter_failure(context: Any, failure: Any, case: Any, response: Any) -> bool:
    """What the schema admits may be refused, but only for what no schema can say.

    That is not `invalid_request`, but for Cancel-After: no pattern says from how long to how long. And whatever is
    put into a header is text when it arrives, which Prefer may be: what is not known of it is passed over (RFC 7240).
    """
    if type(failure).__name__ == "AcceptedNegativeData":
        return "parameter `prefer` in header" not in failure.message
    if type(failure).__name__ != "RejectedPositiveData" or "json" not in response.headers["content-type"][0]:
        return True
    problem = response.json()
    paths = [each["path"] for each in problem["errors"]]
    return bool(problem["code"] == "invalid_request" and paths != ["Cancel-After"])


def _known(values: dict[str, Any] | None) -> dict[str, Any] | None:
    """`values`, in half of all cases with ids of what there is; which half is told by the values alone."""
    if not values:
        return values
    chance = random.Random(repr(sorted(values.items(), key=repr)))
    found = {
        name: chance.choice(KNOWN[name])
        for name, value in values.items()
        if name in KNOWN and isinstance(value, str) and 1 <= len(value) <= 64  # what is to be refused stays so
    }
    return values | found if chance.random() < 0.5 else values
