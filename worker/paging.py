"""Pages of records in the order of their creation."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

T = TypeVar("T")
Order = Literal["asc", "desc"]

MAX_LIMIT = 1_000
_CHUNK = 256


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
    after: str | None = None,
    limit: int = 20,
    order: Order = "desc",
) -> Page[T]:
    """Up to `limit` records from the sorted set `index`, behind the id `after`; `load` may leave some out.

    Raises `KeyError` where `after` is not in the index, `ValueError` for a limit out of bounds.
    """
    if not 1 <= limit <= MAX_LIMIT:
        raise ValueError(f"limit is {limit}; it must be from 1 to {MAX_LIMIT}")
    rank = redis.zrevrank if order == "desc" else redis.zrank
    start = 0
    if after is not None:
        place = rank(index, after)
        if place is None:
            raise KeyError(after)
        start = place + 1
    found: list[T] = []
    while len(found) <= limit:
        ids = redis.zrange(index, start, start + max(_CHUNK, limit) - 1, desc=order == "desc")
        if not ids:
            break
        found += load(ids)
        place = rank(index, ids[-1])  # records that were added meanwhile have moved it
        start = start + len(ids) if place is None else place + 1
    return Page(found[:limit], len(found) > limit)
