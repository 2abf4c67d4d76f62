"""Which part of an image set a name assigns an image to: `train/cat/1.png`, `x_test.npy`, `val2017`."""

import re
import sys
from collections.abc import Iterable, Sequence
from enum import Enum
from functools import lru_cache
from typing import NamedTuple

from flowpp import cifar
from flowpp.images import BadImages, shortened


class Part(Enum):
    """A part of an image set."""

    TRAINING = "training"
    VALIDATION = "validation"
    TEST = "test"


class _Unclear(Enum):
    """Names of a split that do not say enough by themselves."""

    HELD_OUT = "held out"
    """The validation part, unless another part is named so."""
    UNKNOWN = "unknown"
    """A fold, or a name with words of two parts (`trainval`)."""


_Role = Part | _Unclear

_WORDS: dict[_Role, str] = {
    Part.TRAINING: "train|training|trn",
    Part.VALIDATION: "val|vali|valid|validate|validation|vld|dev|devel|development|minival",
    Part.TEST: "test|tests|testing|tst",
    _Unclear.HELD_OUT: "eval|evaluate|evaluation|holdout|heldout",
}
_THINGS = "(?:set|sets|data|dataset|split|part|image|images|img|imgs)?"
_ROLES = [(role, re.compile(f"[xy]?(?:{words}){_THINGS}")) for role, words in _WORDS.items()]
_SHORT = {"tr": Part.TRAINING, "va": Part.VALIDATION, "te": Part.TEST}  # as in x_tr; alone they are languages
_GLUED = [
    (role, re.compile(f"(?<=[a-z])(?:{words})(?![a-z])|(?<![a-z])(?:{words})(?=[a-z])(?!ers?(?![a-z]))"))
    for role, words in _WORDS.items()
]
_FOLD = re.compile(r"(?<![a-z])(?:fold|split)[^a-z0-9]?[0-9]")
_HINT = re.compile("tr|te|va|dev|vld|tst|hold|held|fold|split", re.IGNORECASE)
_TOKENS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")  # words of trainA, XTrain and TRAIN


def parts_by_name(names: Sequence[str], counts: Sequence[int]) -> list[Part] | None:
    """The part of each file, or None if the names indicate no split.

    `names` are paths with `/`, and `counts` the files' numbers of images. The names at one place all indicate a part,
    or none does. A name that all files share yields to names below it. Within a part, names such as the class
    folder `test/train/` of vehicles mean nothing if their neighbours indicate no part. Raises `BadImages`
    (`ambiguous_split`) if names contradict each other or leave images out.
    """
    roles: list[_Role | None] = [None] * len(names)
    if not any(_HINT.search(name.lower()) or cifar.is_batch(_file(name)) for name in names):
        return None
    paths = [_path(name) for name in names]
    places: list[_Place] = [_Place(list(range(len(names))), 0, None, False)]
    while places:
        place = places.pop()
        groups: dict[str, list[int]] = {}
        for file in place.files:
            if place.depth < len(paths[file]):
                groups.setdefault(paths[file][place.depth], []).append(file)
            else:
                roles[file] = place.role
        found = _roles_at(place, groups, names, counts)
        divides = place.is_decided or (len(found) == len(groups) and len(set(found.values())) > 1)
        for component, files in groups.items():
            role = found.get(component, place.role)
            # what a part's class folder of trains holds may be called train, too
            depth = sys.maxsize if place.is_decided and component not in found and _role(component) else place.depth + 1
            places.append(_Place(files, depth, role, divides))
    return _resolved(roles, names, counts)


class _Place(NamedTuple):
    """A folder while the names in it are read: its files, and what the names above it indicate."""

    files: list[int]
    depth: int
    role: _Role | None
    is_decided: bool
    """True if the role distinguishes it from other folders."""


def _roles_at(
    place: _Place, groups: dict[str, list[int]], names: Sequence[str], counts: Sequence[int]
) -> dict[str, _Role]:
    """The components at a place that indicate a role. Raises `BadImages` if they cannot be followed."""
    found = _twins(groups) | {component: role for component in groups if (role := _role(component))}
    if place.is_decided or len(groups) == 1:
        found = {component: role for component, role in found.items() if role is not _Unclear.UNKNOWN}
    others = [component for component, role in found.items() if role is not place.role]
    is_partial = len(found) < len(groups)
    if not others or (is_partial and (place.is_decided or _count(others, groups, counts) == 1)):
        return {}
    example = names[groups[others[0]][0]]
    if unclear := [component for component, role in found.items() if role is _Unclear.UNKNOWN]:
        message = f"{shortened(unclear[0])!r} does not say whether its images are for training or held out"
        raise _ambiguous(message, names[groups[unclear[0]][0]])
    if place.is_decided or (place.role and is_partial):
        raise _ambiguous("its names indicate two parts", example)
    return found


def _twins(components: Iterable[str]) -> dict[str, _Role]:
    """Components that differ only in the word of a part, `mytrain` and `mytest` or `tr` and `te`, with their roles.

    One of them alone may be another word, as `latest` is.
    """
    short: dict[str, _Role] = {name: _SHORT[name.lower()] for name in components if name.lower() in _SHORT}
    if len(short) > 1 and Part.TRAINING in short.values() and short.keys() == set(components):
        return short
    alike: dict[str, dict[str, _Role]] = {}
    for component in filter(_HINT.search, components):
        lower = component.lower()
        for role, pattern in _GLUED:
            if match := pattern.search(lower):
                rest = re.sub("[0-9]+", "0", f"{lower[: match.start()]}/{lower[match.end() :]}")
                alike.setdefault(rest, {})[component] = role
    return {
        component: role
        for twins in alike.values()
        if Part.TRAINING in twins.values() and len(set(twins.values())) > 1
        for component, role in twins.items()
    }


def _count(components: list[str], groups: dict[str, list[int]], counts: Sequence[int]) -> int:
    return sum(counts[file] for component in components for file in groups[component])


def _resolved(roles: list[_Role | None], names: Sequence[str], counts: Sequence[int]) -> list[Part] | None:
    indicated = [file for file, role in enumerate(roles) if role]
    # a single image called test.png among others is a picture, not a test part
    if len(indicated) < len(roles) and sum(counts[file] for file in indicated) <= 1:
        return None
    if None in roles:
        message = f"is in no part, but the name of {shortened(names[indicated[0]])} indicates one"
        raise _ambiguous(message, names[roles.index(None)])
    if _Unclear.HELD_OUT in roles and Part.VALIDATION in roles:
        message = "could be for validation or for test, and there is another validation part"
        raise _ambiguous(message, names[roles.index(_Unclear.HELD_OUT)])
    return [role if isinstance(role, Part) else Part.VALIDATION for role in roles if role]


def _file(name: str) -> str:
    return name.rpartition("/")[2]


def _path(name: str) -> list[str]:
    """The folders of a file and its name without suffix; batches of CIFAR-10 count as being in a folder."""
    *folders, file = name.split("/")
    if cifar.is_batch(file):
        return [*folders, "test" if file.startswith("test") else "train"]
    stem, dot, _ = file.rpartition(".")
    return [*folders, stem if dot else file]


@lru_cache(maxsize=4096)
def _role(name: str) -> _Role | None:
    """The role that the name of a folder, a file or an array indicates, or None."""
    lower = name.lower()
    if not _HINT.search(lower):
        return None
    if _FOLD.search(lower):
        return _Unclear.UNKNOWN
    words = {token.lower() for token in _TOKENS.findall(name)} | set(re.findall("[a-z]+", lower))
    found: set[_Role] = {role for role, pattern in _ROLES if any(map(pattern.fullmatch, words))}
    if "x" in words:
        found |= {role for word, role in _SHORT.items() if word in words}
    found |= {role for word, role in _SHORT.items() if f"x{word}" in words}
    if re.search("(hold|held)[^a-z]?out", lower):
        found.add(_Unclear.HELD_OUT)
    if words & {"trainval", "traindev", "traintest", "trainvalid"}:
        found.add(_Unclear.UNKNOWN)
    if not found:
        return None
    return found.pop() if len(found) == 1 else _Unclear.UNKNOWN


def _ambiguous(message: str, name: str | None = None) -> BadImages:
    advice = "put all images into parts named train, validation and test, or name none of them so"
    return BadImages("ambiguous_split", f"{message}; {advice}", name)
