"""Whose things are."""

LOCAL = "local"
"""The owner of all where authentication is off."""


def index_of(things: str, owner: str | None) -> str:
    """The sorted set of the ids of everybody's jobs, datasets, checkpoints or keys, or of those of one owner."""
    return f"flowpp:{things}" if owner is None else f"flowpp:{things}:owner:{owner}"
