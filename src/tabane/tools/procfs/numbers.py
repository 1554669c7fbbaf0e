"""Numbers for the processes of other nodes, of one view: from above the kernel's largest pid up.

A number means one process as long as the view lives. It is given out once: a pid that its node gave
to another process gets another number, and so does everything after a node's next start. No process
here can ever have one, so a call that is not carried to the node it is meant for hits nobody.
"""

from __future__ import annotations

from collections.abc import Container
from typing import NamedTuple

FIRST = (1 << 22) + 1
"""PID_MAX_LIMIT of a 64-bit kernel is 1 << 22, and no pid reaches it."""
LAST = (1 << 31) - 1
"""pid_t has 32 bits, and the first is its sign."""


class Key(NamedTuple):
    """One process of the cluster, for ever. `start` is in its machine's ticks; 0 for one of which
    only the number is known, as a process group whose first process has ended."""

    node: str
    incarnation: str
    pid: int
    start: int


class Numbers:
    """The numbers of one view."""

    def __init__(self) -> None:
        self._given: dict[Key, int] = {}
        self._next = FIRST

    def of(self, key: Key) -> int:
        """The same for the same process. Raises `OverflowError` after two thousand millions."""
        found = self._given.get(key)
        if found is None:
            if self._next > LAST:
                raise OverflowError("this view has no numbers left: open the shell anew")
            found = self._given[key] = self._next
            self._next += 1
        return found

    def forget(self, nodes: Container[str], living: Container[Key]) -> None:
        """Processes of `nodes` that do not live any more. Their numbers are not given again."""
        gone = [key for key in self._given if key.node in nodes and key not in living]
        for key in gone:
            del self._given[key]

    def __len__(self) -> int:
        return len(self._given)
