"""Python's garbage collector in processes that serve for days: what they begin with is no garbage."""

import gc

_YOUNG = 10_000
"""Objects more than before, at which the collector looks at the new ones."""


def settle() -> None:
    """Collects what is garbage now, and leaves all that stays out of every later collection.

    Most of what a server holds, its modules and models, lives as long as it does, and would be looked through over
    and over while it answers. To be called again where much has come or gone since.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG, *gc.get_threshold()[1:])
