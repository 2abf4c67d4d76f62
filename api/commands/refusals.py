"""Refusals of the service in the words of the command line: options in place of headers and of fields in JSON."""

import re
from http import HTTPStatus

from api.client import ProblemError

_OPTIONS = {
    "model.preset": "--preset",
    "training.steps": "--steps",
    "cancel-after": "--cancel-after",
    "importance_samples": "--importance-samples",
    "bits_map": "--bits-map",
    "latents": "--latents",
    "num_samples": "--num-samples",
    "temperature": "--temperature",
    "seed": "--seed",
    "resume_from": "--resume-from",
    "metadata": "--metadata",
    "events": "--event",
    "preset": "--preset",
    "status": "--status",
    "type": "--type",
    "job": "--job",
    "url": "URL",
    "file": "the file",
    "files": "the images",
    "body": "",
    "model": "",
    "training": "",
}
"""Fields, parameters and headers of the API by the options that fill them; an empty one is left out of the sentence."""

_WORDS = [
    (re.compile(r"\b(training|model)((?:\.[a-z_]+)+) (\d[\d,]*)"), lambda found: _set(found[1] + found[2], found[3])),
    (re.compile(r"(?<!--set )\b(?:training|model)(?:\.[a-z_]+)+"), lambda found: _set(found[0])),
    (re.compile(r"`?\bCancel-After\b`?"), lambda _: "--cancel-after"),
    (re.compile(r", which (?:GET|HEAD|OPTIONS|POST|PUT|PATCH|DELETE|/\S+) needs"), lambda _: ""),
    (re.compile(r"`?GET /v1/presets`?"), lambda _: "`flowpp presets list`"),
]
"""Words in sentences of the service, and the words of the command line for them."""

_UNDER_WAY = "the service still works on the same request, which an earlier try has sent; try again in a while"


def in_words(error: ProblemError, url: str, key: str) -> str:
    """Returns what the command prints about a refusal by the service at `url` of a request with `key`."""
    match error.code:
        case "unauthenticated" if key:
            return f"the service at {url} does not accept this key; check --key or FLOWPP_API_KEY ({error.code})"
        case "unauthenticated":
            return (
                f"the service at {url} needs a key: give it by --key or FLOWPP_API_KEY; "
                f"`flowpp keys create`, on the service's machine, makes one ({error.code})"
            )
        case "scope_missing":
            hint = "`flowpp keys create --scope`, on the service's machine, makes one that has it"
            return f"{translated(error.detail)}; {hint} ({error.code})"
        case "idempotency_in_progress":
            return f"{_UNDER_WAY} ({error.code})"
        case "not_found":
            return f"{url} has no such path; --url (FLOWPP_URL) is the service's address alone ({error.code})"
        case "http_error":
            return f"{url} answers {error.status} {_phrase(error)}; is --url (FLOWPP_URL) a flowpp service?"
    lines = [_fault(each) for each in error.errors]
    if not any(str(each.get("detail", "")) and str(each["detail"]) in error.detail for each in error.errors):
        lines.insert(0, translated(error.detail))
    return "\n  ".join([f"{lines[0]} ({error.code})", *lines[1:]])


def translated(sentence: str) -> str:
    """Returns a sentence of the service with options for the fields and headers that it names."""
    for pattern, words in _WORDS:
        sentence = pattern.sub(words, sentence)
    return sentence


def option_of(path: str) -> str:
    """Returns the option that fills the field, query parameter or header `path`; an empty text if none does alone."""
    names = path.split(".")
    names = names[: next((i for i, name in enumerate(names) if name.isdecimal()), len(names))]
    found = ".".join(names)
    for known in (found.lower(), names[0].partition("[")[0].lower() if names else ""):
        if known in _OPTIONS and (known not in ("model", "training") or len(names) == 1):
            return _OPTIONS[known]
    return _set(found) if names and names[0] in ("model", "training") else path


def _fault(fault: dict[str, object]) -> str:
    option, detail = option_of(str(fault.get("path", ""))), translated(str(fault.get("detail", "")))
    return detail if not option or detail.startswith(option) else f"{option}: {detail}"


def _set(path: str, value: str = "") -> str:
    if path in _OPTIONS:
        return f"{_OPTIONS[path]} {value.replace(',', '')}".rstrip()
    return f"--set {path}={value.replace(',', '') or '...'}"


def _phrase(error: ProblemError) -> str:
    """Returns what a server that is no flowpp service answered, on one line and without pages of HTML."""
    text = " ".join(error.detail.split())
    if text and not text.startswith("<"):
        return text[:200]
    return HTTPStatus(error.status).phrase if error.status in {each.value for each in HTTPStatus} else ""
