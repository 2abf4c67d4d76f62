"""Pages of records in the order of their creation."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

from worker.transitions import load_script

T = TypeVar("T")
Order = Literal["asc", "desc"]

MAX_LIMIT = 1_000
_CHUNK, _LARGEST_CHUNK = 250, 2_000
"""Ids among which is looked for what matches, first and later: where little does, more at a time."""


@dataclass(frozen=True)
class Page(Generic[T]):
    """Records, and whether there are more behind them."""

    data: list[T]
    has_more: bool


def read_page(
    redis: Any,
    index: str,
    load: Callable[[list[str]], list[T]],
    *,
    parts: Callable[[], Sequence[str]] | None = None,
    choose: Callable[[list[str]], list[str]] | None = None,
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> Page[T]:
    """Up to `limit` records from the sorted set `index`, behind the id `after`.

    Where `parts` name lists of jobs by status, only what is in one of them, and once where it is moved from one to
    another meanwhile; they are asked for again where all jobs are listed anew. `choose` says which of some ids match,
    all where there is none; `load` may leave out what was deleted. Raises `KeyError` where `after` is not in the index,
    `ValueError` for a limit out of bounds.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit is {limit}; it must be from 1 to {MAX_LIMIT}")
    behind = "-inf" if order == "asc" else "+inf"
    if after is not None:
        place = redis.zscore(index, after)
        if place is None:
            raise KeyError(after)
        behind = f"({place:.0f}"
    merge = load_script(redis, "merge")
    lists = [index] if parts is None else parts()
    found: list[T] = []
    chunk = _CHUNK
    while len(found) <= limit:
        most = limit + 1 if choose is None else chunk
        members = merge(keys=lists, args=[order, behind, most, int(parts is not None)])
        if members is None and parts is not None:
            lists = parts()
            continue
        chunk = min(2 * chunk, _LARGEST_CHUNK)
        if not members:
            break
        ids = [member for member, _ in members]
        chosen = ids if choose is None else choose(ids)
        while chosen and len(found) <= limit:
            wanted = limit + 1 - len(found)
            found += load(chosen[:wanted])
            chosen = chosen[wanted:]
        behind = f"({members[-1][1]}"
    return Page(found[:limit], len(found) > limit)
