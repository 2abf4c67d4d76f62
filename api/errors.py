"""The error codes: what each means, and what to do. docs/errors.md and the page at /docs/errors are made of them."""

from collections.abc import Iterator, Mapping
from html import escape
from typing import NamedTuple

PAGE = "/docs/errors"
"""Where the service shows them. A problem's `type` leads there."""


class ErrorCode(NamedTuple):
    """The HTTP statuses that it comes with, a sentence on what has happened, and one on what to do about it."""

    statuses: tuple[int, ...]
    meaning: str
    remedy: str


REFUSALS: Mapping[str, ErrorCode] = {
    # the request
    "invalid_request": ErrorCode(
        (422,),
        "A field, a header or the body is not what the endpoint takes.",
        "Mend what `errors` names, each by its path.",
    ),
    "unsupported_media_type": ErrorCode(
        (415,),
        "The body, or a part of it, has a media type or an encoding that the endpoint does not accept.",
        "Send the media type that `detail` names, and the body without compression.",
    ),
    "body_too_large": ErrorCode(
        (413,), "The body has more bytes than the endpoint takes.", "Send less, or in several requests."
    ),
    "body_too_slow": ErrorCode(
        (408,), "The body did not come in the time that a body of its size has.", "Send it again, over a better line."
    ),
    "disconnected": ErrorCode((400,), "The body ended before all of it was sent.", "Send it again."),
    "method_not_allowed": ErrorCode(
        (405,), "The path is there, but not for this method.", "Use a method of the header `Allow`."
    ),
    "not_found": ErrorCode((404,), "There is no such path.", "See /docs for those that there are."),
    "range_not_satisfiable": ErrorCode(
        (416,), "The `Range` lies beyond the end of the file.", "Ask within the size that `Content-Range` names."
    ),
    "invalid_event_id": ErrorCode(
        (422,), "`after` or `Last-Event-ID` is no event's id.", "Send the id of an event of this job, or none."
    ),
    "idempotency_key_reused": ErrorCode(
        (422,), "The `Idempotency-Key` was sent with another request before.", "Use a new key for each new request."
    ),
    "idempotency_in_progress": ErrorCode(
        (409,), "A request with this `Idempotency-Key` is under way.", "Wait a moment and send it again."
    ),
    "http_error": ErrorCode((), "The answer is no problem document; a proxy may have sent it.", "See `detail`."),
    # who asks
    "unauthenticated": ErrorCode(
        (401,), "There is no key in the request, or none that is known.", "Send `Authorization: Bearer flowpp_...`."
    ),
    "scope_missing": ErrorCode((403,), "The key may not do this.", "Use a key with the scope that `detail` names."),
    "not_loopback": ErrorCode(
        (403,),
        "Authentication is off, and the request did not come over loopback.",
        "Set `FLOWPP_AUTHENTICATION=true` and use a key.",
    ),
    "rate_limited": ErrorCode(
        (429,), "The key has sent more requests than it may in a minute.", "Wait as `Retry-After` says."
    ),
    "quota_exceeded": ErrorCode(
        (403,),
        "The owner has as many unfinished jobs, or stores as many bytes, as it may.",
        "Wait for jobs to finish, or delete datasets and checkpoints.",
    ),
    # what is not there, or not as it would have to be
    "job_not_found": ErrorCode(
        (404,), "There is no such job, or it is somebody else's, or it has expired.", "List those that there are."
    ),
    "dataset_not_found": ErrorCode(
        (404,), "There is no such dataset, or it is somebody else's.", "List those that there are."
    ),
    "checkpoint_not_found": ErrorCode(
        (404,), "There is no such checkpoint, or it is somebody else's.", "List those that there are."
    ),
    "artifact_not_found": ErrorCode((404,), "The job has left no such file, or none yet.", "List its artifacts."),
    "webhook_not_found": ErrorCode(
        (404,), "There is no such webhook, or it is somebody else's.", "List those that there are."
    ),
    "job_finished": ErrorCode((409,), "The job has ended and cannot change any more.", "Create another one."),
    "job_not_paused": ErrorCode(
        (409,), "Only a paused training job can be resumed.", "Look at its `status`; wait until it is `paused`."
    ),
    "not_pausable": ErrorCode(
        (409,), "Only training jobs can be paused, while they wait or run.", "Cancel it instead."
    ),
    "no_checkpoint": ErrorCode(
        (409,), "The training job has no checkpoint yet, so that it is no model.", "Wait for its first one."
    ),
    "in_use": ErrorCode((409,), "A job that has not finished needs it.", "Cancel that job, or wait for its end."),
    "queue_full": ErrorCode((429,), "As many jobs wait as may.", "Wait as `Retry-After` says."),
    # training
    "invalid_configuration": ErrorCode(
        (422,),
        "Model and recipe do not fit each other or the dataset's images.",
        "See `errors`: it names what would have to hold.",
    ),
    "no_training_images": ErrorCode(
        (422,), "All images of the dataset are for validation or test.", "Upload one with training images."
    ),
    "too_few_training_images": ErrorCode(
        (422,),
        "The dataset, or `training.init_batch_size`, has fewer images than the initialization of a model needs.",
        "Upload as many as `detail` names, or start from a checkpoint with `resume_from`.",
    ),
    "batch_larger_than_dataset": ErrorCode(
        (422,),
        "A batch has more images than the dataset has for training.",
        "Choose a smaller `training.batch_size`, or upload more images.",
    ),
    "too_many_processes": ErrorCode(
        (422,), "No worker offers so many processes.", "Choose a smaller `training.num_processes`."
    ),
    "out_of_memory": ErrorCode(
        (422,),
        "No worker that is there has the memory that the training would take, however few images pass at once.",
        "Leave `training.micro_batch_size` and `training.activation_checkpointing` to the run, or choose what `detail` "
        "names, or a smaller model.",
    ),
    "wrong_model": ErrorCode(
        (422,), "The checkpoint of `resume_from` is of another model.", "Ask for the model that it is of."
    ),
    # likelihood and sampling
    "wrong_image_shape": ErrorCode(
        (422,), "The images are of another size or colour than the model's.", "Send images as `detail` describes them."
    ),
    "no_images": ErrorCode((422,), "There is no image in what was sent, or both files and a dataset.", "Send images."),
    "too_many_images": ErrorCode(
        (422,), "There are more images than are accepted.", "Send fewer, or in several requests."
    ),
    "too_many_importance_samples": ErrorCode(
        (422,), "More importance samples an image than are accepted.", "Ask for fewer."
    ),
    "too_many_samples": ErrorCode((422,), "More samples than are accepted.", "Ask for fewer."),
    "too_few_samples": ErrorCode((422,), "An interpolation has at least its two ends.", "Ask for two or more."),
    "invalid_temperature": ErrorCode((422,), "An interpolation has no temperature.", "Leave it out."),
    "wrong_ends": ErrorCode(
        (422,), "An interpolation is between two images.", "Send two files, or name two images of a dataset."
    ),
    "no_such_image": ErrorCode((422,), "The dataset has no image of this index.", "Use the indices that it has."),
    # checkpoints of others
    "unknown_preset": ErrorCode((422,), "There are no published weights of this name.", "Use one that `detail` names."),
    "bad_checkpoint": ErrorCode(
        (422,), "The file does not hold the published weights of this preset.", "Send the authors' file as it is."
    ),
    # images and archives
    "not_an_image": ErrorCode((422,), "A file is no image of a kind that is read.", "Leave it out or convert it."),
    "unsupported_format": ErrorCode((422,), "An image is of a kind that is not read.", "Convert it to PNG."),
    "damaged_image": ErrorCode((422,), "An image is truncated or damaged.", "Replace it or leave it out."),
    "animated_image": ErrorCode((422,), "A file holds more than one picture.", "Send single pictures."),
    "transparent_image": ErrorCode((422,), "An image has transparent pixels.", "Flatten it onto a background."),
    "unsupported_depth": ErrorCode((422,), "An image has more than 8 bits a channel.", "Convert it to 8 bits."),
    "unsupported_colour": ErrorCode((422,), "An image is neither grey nor RGB.", "Convert it to one of them."),
    "image_too_large": ErrorCode((422,), "An image has more pixels or bytes than are accepted.", "Scale it down."),
    "image_too_small": ErrorCode((422,), "An image is smaller than any model takes.", "Send larger ones."),
    "mixed_sizes": ErrorCode((422,), "The images are not all of one size and colour.", "Make them alike."),
    "ambiguous_split": ErrorCode(
        (422,),
        "Names of folders, arrays or files indicate for some images, but not for all, which part they are in.",
        "Put all of them into `train`, `validation` and `test`, or none.",
    ),
    "unsupported_array": ErrorCode(
        (422,), "An array is no uint8 [N, H, W] or [N, H, W, C].", "Save one that is, by `np.save`."
    ),
    "damaged_array": ErrorCode((422,), "An array's file is truncated or damaged.", "Save it again by `np.save`."),
    "damaged_batch": ErrorCode(
        (422,), "A batch of CIFAR-10 is truncated or damaged.", "Send the official archive as it is."
    ),
    "unsafe_pickle": ErrorCode(
        (422,), "A batch of CIFAR-10 holds what would run code.", "Send the official archive as it is."
    ),
    "damaged_archive": ErrorCode((422,), "The archive is truncated or damaged.", "Make it again."),
    "unsafe_archive": ErrorCode(
        (422,),
        "The archive holds links, devices, encrypted files or names that lead out of it.",
        "Make it of plain files.",
    ),
    "unsupported_archive": ErrorCode(
        (422,), "The archive is compressed in a way that is not read.", "Send a .zip, .tar or .tar.gz."
    ),
    "nested_archive": ErrorCode(
        (422,), "An archive is inside an archive or among other files.", "Put the images into one archive."
    ),
    "too_many_entries": ErrorCode(
        (422,),
        "The archive has more entries than are accepted.",
        "Instead of a zip (80,000) send a tar (250,000), or an array.",
    ),
    "decompression_bomb": ErrorCode(
        (422,), "The archive grows on unpacking as no images do.", "Send the images less compressed."
    ),
    "too_large": ErrorCode(
        (413,), "The images have more bytes than are accepted, packed or unpacked.", "Send fewer or smaller ones."
    ),
    # webhooks
    "invalid_url": ErrorCode((422,), "The webhook's URL is none that can be called.", "Mend what `detail` names."),
    "private_address": ErrorCode(
        (422,),
        "The webhook's host is, or resolves to, an address that is not public.",
        "Give a public one; the operator can allow private networks with `FLOWPP_WEBHOOK_NETWORKS`.",
    ),
    "unresolvable_host": ErrorCode((422,), "The webhook's host has no address.", "Check its name."),
    # the service
    "too_many_uploads": ErrorCode(
        (503,), "As many large uploads are under way as can be.", "Try again in a while, as `Retry-After` says."
    ),
    "disk_full": ErrorCode(
        (507,), "The service has no space left for what was sent.", "Tell who runs it; try again later."
    ),
    "artifact_damaged": ErrorCode(
        (500,), "A stored file is not what was stored.", "Tell who runs the service: it is to come back from a backup."
    ),
    "store_unavailable": ErrorCode(
        (503,), "The service cannot reach its artifact store.", "Try again in a while, as `Retry-After` says."
    ),
    "redis_unreachable": ErrorCode(
        (503,),
        "The service cannot reach Redis, or Redis refuses commands in its present state: `detail` says why.",
        "Try again in a while, as `Retry-After` says.",
    ),
    "internal_error": ErrorCode(
        (500,), "The service failed.", "Look into its log under the reference that `detail` names."
    ),
}
"""Codes of problem documents."""

FAILURES: Mapping[str, ErrorCode] = {
    "worker_lost": ErrorCode(
        (),
        "Its worker was lost as often as attempts may fail without progress between.",
        "See its attempts; look after the machine.",
    ),
    "out_of_memory": ErrorCode(
        (), "It takes more memory than the worker has.", "Choose what `message` names, or a smaller model."
    ),
    "nan_loss": ErrorCode(
        (),
        "Losses or gradients were not finite, also after the learning rate was lowered.",
        "Choose a lower `learning_rate`, or a longer warm-up.",
    ),
    "not_finite": ErrorCode(
        (),
        "The model gives likelihoods, latents or images that are NaN or infinite: its training has diverged.",
        "Use an earlier checkpoint, or train again with a lower `learning_rate`.",
    ),
    "diverged": ErrorCode(
        (),
        "Bits/dim rose above what a uniform code costs, or were above it from the beginning, and stayed there.",
        "Choose a lower `learning_rate`, or a longer warm-up. The job's best checkpoint is from before that.",
    ),
    "bad_dataset": ErrorCode(
        (), "The dataset's stored images cannot be read or do not fit.", "Upload the dataset again."
    ),
    "disk_full": ErrorCode((), "The worker's disk had no room for the last checkpoint.", "Make room on it."),
    "internal": ErrorCode((), "The work failed for another reason.", "See `message`, and the job's log."),
}
"""Codes in the `error` of a failed job."""

COMMAND_LINE: Mapping[str, ErrorCode] = {
    "no_such_file": ErrorCode((), "There is no such file or folder.", "Check the path."),
    "unsafe_folder": ErrorCode((), "A folder of images holds a link to a folder.", "Copy what it leads to."),
    "too_many_files": ErrorCode((), "A folder holds more files than are accepted.", "Use an array instead."),
    "bad_image_set": ErrorCode((), "A folder of images that were taken in is damaged.", "Take them in again."),
    "bad_latents": ErrorCode((), "A file holds no latents of the model.", "Use what `encode` has written."),
    "key_not_found": ErrorCode((), "There is no such key.", "List them with `flowpp keys list`."),
    "not_empty": ErrorCode((), "`flowpp reindex` found records in Redis.", "Let it rebuild an empty one."),
    "not_indexed": ErrorCode((), "`flowpp gc` found a store of which Redis knows nothing.", "Run `flowpp reindex`."),
    "empty_store": ErrorCode((), "`flowpp backup` found an empty store.", "Name the one that the service has."),
}
"""Codes of commands that work without HTTP: `python -m flowpp`, which also has those of images, and `flowpp keys`,
`reindex`, `gc` and `backup`."""

INTRODUCTION = (
    "Errors are `application/problem+json` (RFC 9457): `type`, which leads here, `title`, `status`, `detail` (a "
    "sentence: what was wrong, where, and what would be right), `code`, `instance` (the path of the request) and "
    "`errors` (each with the `path` of a field and a `detail`). Codes are stable: a program may rely on them."
)

_SECTIONS = (
    ("Refused requests", "", REFUSALS),
    ("Failed jobs", "job-", FAILURES),
    ("On the command line", "", COMMAND_LINE),
)


def uri_of(code: str) -> str:
    """The `type` of a problem: a reference to what the service says of its code."""
    return f"{PAGE}#{code}"


def as_markdown() -> str:
    """docs/errors.md."""
    return "\n".join(["# Error codes", "", INTRODUCTION, *_markdown_sections(), ""])


def _markdown_sections() -> Iterator[str]:
    for title, _, codes in _SECTIONS:
        yield from ("", f"## {title}", "", "| code | status | what has happened | what to do |", "|---|---|---|---|")
        for code, error in codes.items():
            yield f"| `{code}` | {_statuses(error)} | {error.meaning} | {error.remedy} |"


def as_html() -> str:
    """The page at `PAGE`: one file, without scripts."""
    sections = "".join(_html_sections())
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>flowpp: error codes</title>'
        '<meta name="viewport" content="width=device-width"><style>'
        "body{font:16px/1.5 system-ui,sans-serif;max-width:70rem;margin:2rem auto;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.3rem .8rem .3rem 0;"
        "border-bottom:1px solid #ddd}tr:target{background:#fff3c4}"
        f"</style></head><body><h1>Error codes</h1><p>{_html(INTRODUCTION)}</p>{sections}</body></html>\n"
    )


def _html_sections() -> Iterator[str]:
    for title, prefix, codes in _SECTIONS:
        yield f"<h2>{title}</h2><table><tr><th>code<th>status<th>what has happened<th>what to do</tr>"
        for code, error in codes.items():
            cells = (f"`{code}`", _statuses(error), error.meaning, error.remedy)
            yield f'<tr id="{prefix}{code}">' + "".join(f"<td>{_html(cell)}" for cell in cells) + "</tr>"
        yield "</table>"


def _html(text: str) -> str:
    """Text with `code` in it."""
    parts = escape(text).split("`")
    return "".join(f"<code>{part}</code>" if index % 2 else part for index, part in enumerate(parts))


def _statuses(error: ErrorCode) -> str:
    return ", ".join(map(str, error.statuses))
