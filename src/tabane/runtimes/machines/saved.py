"""What a checkpoint of a machine consists of.

memory        what the guest has in memory; what it never touched, or is zero, is a hole
state         processor and devices, in the format of who runs the machine
layer         its disk for what is written, of the same moment
restore.json  `Saved`
"""

from __future__ import annotations

from pathlib import Path

from tabane.runtimes.contents import Contents, read_contents

MEMORY, STATE, LAYER = "memory", "state", "layer"


class Saved(Contents, frozen=True, kw_only=True):
    """`memory_bytes`: of the machine; `ticks_khz`: how fast the counter went by which an emulated
    processor's kernel tells the time, else 0."""

    memory_bytes: int
    ticks_khz: int


def read_saved(directory: Path) -> Saved:
    """Raises `Corrupt`, as `read_contents`."""
    return read_contents(directory, Saved, "a machine", (MEMORY, STATE, LAYER))
