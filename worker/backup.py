"""A backup: the artifact store in another place, from which `flowpp reindex` rebuilds all that Redis knew.

It may be made beside the service. The files of each stored directory are verified as they are copied, and its manifest
is written last. What is deleted before it is copied, say a job's record since there is a newer one, is looked for
again; what is deleted afterwards stays until the next backup. Jobs come first: what they use may then be newer than
they are, but not older.
"""

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

from pydantic import BaseModel

from worker.artifacts import ALONE, MANIFEST, ArtifactStore, DamagedArtifact
from worker.rebuilding import KINDS
from worker.recorder import changed_of
from worker.refusals import Conflict, NotFound

_FOLDERS = ("jobs", *KINDS.values())
_THREADS = 8

_Came = Literal["copied", "unchanged", "damaged", "gone"]


class BackedUp(BaseModel):
    """What `back_up` has done with stored directories."""

    copied: int = 0
    unchanged: int = 0
    deleted: int = 0
    damaged: list[str] = []


def back_up(source: ArtifactStore, target: ArtifactStore) -> BackedUp:
    """Makes `target` hold what `source` held at some time meanwhile, and nothing else of the kind.

    What is damaged in `source` is told and not copied; what `target` had of it before stays. Raises `OSError` where one
    of them cannot be reached, and `Conflict` where `source` is empty: a backup of a store that was lost is not emptied.
    """
    places = _places(source, _FOLDERS)
    if not places:
        raise Conflict("empty_store", "there is nothing in the store to back up; what was backed up before stays")
    done = BackedUp()
    kept: set[str] = set()
    while places:
        kept |= set(places)
        places = _places(source, _copy(source, target, places, done))
    kept |= set(_places(source, _FOLDERS))
    for place in _places(target, _FOLDERS):
        if place not in kept:
            target.delete(place)
            done.deleted += 1
    return done


def _copy(source: ArtifactStore, target: ArtifactStore, places: list[str], done: BackedUp) -> set[str]:
    """Copies stored directories; the jobs and the like of which some were deleted meanwhile."""

    def copy(place: str) -> _Came:
        try:
            return "copied" if source.replicate(place, target) else "unchanged"
        except DamagedArtifact as error:
            done.damaged.append(str(error))
            return "damaged"
        except NotFound:
            return "gone"

    with ThreadPoolExecutor(_THREADS, "backup") as threads:
        came = list(threads.map(copy, places))
    done.copied += came.count("copied")
    done.unchanged += came.count("unchanged")
    return {"/".join(place.split("/")[:2]) for place, what in zip(places, came, strict=True) if what == "gone"}


def _places(store: ArtifactStore, things: Iterable[str]) -> list[str]:
    """Of the stored directories in folders, or of a job and the like: jobs have several, the others are one."""
    found = []
    for thing in things:
        for file in store.listing(thing):
            place, _, name = f"{thing}/{file.name}".rpartition("/")
            if name == MANIFEST and place.count("/") == (2 if place.startswith("jobs/") else 1):
                found.append(place)
            elif name.endswith(ALONE) and changed_of(name) and place.startswith("jobs/") and place.count("/") == 1:
                found.append(f"{place}/{name}")
    return found
