"""What a process begins with is left out of garbage collections."""

import subprocess
import sys

_SETTLED = """
import gc, weakref
from flowpp.garbage_collection import settle

class Node:
    def __init__(self):
        self.own = self

kept, young = Node(), Node()
gone, later = weakref.ref(Node()), weakref.ref(young)
settle()
assert gone() is None, "what is garbage already is collected"
before = gc.get_freeze_count()
assert len(gc.get_objects()) < before / 10, "the rest is not looked at any more"
del young
gc.collect()
assert later() is not None
settle()
assert later() is None, "and again when it is asked for anew"
assert gc.get_freeze_count() < before + 1000
"""


def test_what_there_is_is_looked_at_only_when_a_process_settles() -> None:
    subprocess.run([sys.executable, "-c", _SETTLED], check=True)
