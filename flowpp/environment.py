"""Environment variables that cannot be used."""

import os


class BrokenVariable(ValueError):
    """An environment variable that cannot be used; the message is a sentence that names it."""


def integer(name: str, default: int) -> int:
    """The variable's number, or `default` if it is not set. Raises `BrokenVariable`."""
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isdecimal():
        raise BrokenVariable(
            f"{name} is {value!r}, which is no number; `torch.distributed.run` sets it, otherwise unset it"
        )
    return int(value)
