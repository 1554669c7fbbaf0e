"""What a checkpoint of a machine consists of.

memory        what the guest has in memory; what it never touched, or is zero, is a hole
state         processor and devices, in the format of who runs the machine
layer         its disk for what is written, of the same moment
machine.json  `Saved`
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from tabane.errors import Corrupt
from tabane.model import Value

FORMAT = 1
RECORD = "machine.json"
MEMORY, STATE, LAYER = "memory", "state", "layer"


class Saved(Value, frozen=True):
    """`memory_bytes`: of the machine; `ticks_khz`: how fast the counter went by which an emulated
    processor's kernel tells the time, else 0; `sizes`: of all other files, in bytes."""

    memory_bytes: int
    ticks_khz: int
    sizes: dict[str, int]
    format: int = FORMAT


def write_record(directory: Path, memory_bytes: int, ticks_khz: int) -> None:
    """When all else is there."""
    saved = Saved(memory_bytes, ticks_khz, sizes_of(directory))
    (directory / RECORD).write_bytes(msgspec.json.encode(saved))


def sizes_of(directory: Path) -> dict[str, int]:
    return {each.name: each.stat().st_size for each in directory.iterdir() if each.name != RECORD}


def read_record(directory: Path) -> Saved:
    """Raises `Corrupt` when there is none, or one that this version does not know, or when a file
    is not there as a whole."""
    try:
        saved = msgspec.json.decode((directory / RECORD).read_bytes(), type=Saved)
    except (OSError, msgspec.DecodeError) as error:
        raise Corrupt(f"{directory} has no whole checkpoint of a machine: {error}") from None
    if saved.format != FORMAT:
        raise Corrupt(f"{directory} has a checkpoint of format {saved.format}, not {FORMAT}")
    found = sizes_of(directory)
    for name in (MEMORY, STATE, LAYER):
        if name not in saved.sizes or found.get(name) != saved.sizes[name]:
            here = f"{found[name]} bytes" if name in found else "nothing"
            wanted = saved.sizes.get(name, "an unknown number of")
            raise Corrupt(f"{directory} has {here} of {name}, which has {wanted} bytes")
    return saved
