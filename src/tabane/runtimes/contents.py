"""How the directory of a checkpoint says what is in it, whatever engine wrote it.

A driver adds what it must know to `Contents`, and writes that last, as `restore.json`. Of a
directory in which a file is cut off, or not there, nothing begins.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import field
from msgspec.structs import replace

from tabane.errors import Corrupt
from tabane.model import Value

FORMAT = 1
RECORD = "restore.json"


class Contents(Value, frozen=True, kw_only=True):
    sizes: dict[str, int] = field(default_factory=dict)
    """Of all other files, in bytes."""
    format: int = FORMAT


Told = TypeVar("Told", bound=Contents)


def sizes_of(directory: Path) -> dict[str, int]:
    return {each.name: each.stat().st_size for each in directory.iterdir() if each.name != RECORD}


def write_contents(contents: Contents, directory: Path) -> None:
    """When all else is there, whose sizes are entered."""
    told = replace(contents, sizes=sizes_of(directory))
    (directory / RECORD).write_bytes(msgspec.json.encode(told))


def read_contents(directory: Path, kind: type[Told], what: str, needed: Iterable[str] = ()) -> Told:
    """Of a checkpoint of `what`. Raises `Corrupt` when the directory does not say what is in it, or
    in a way that this version does not know, or when a file is not there as a whole, of those that
    it names and of those that are `needed`."""
    try:
        told = msgspec.json.decode((directory / RECORD).read_bytes(), type=kind)
    except (OSError, msgspec.DecodeError) as error:
        raise Corrupt(f"{directory} has no whole checkpoint of {what}: {error}") from None
    if told.format != FORMAT:
        raise Corrupt(f"{directory} has a checkpoint of format {told.format}, not {FORMAT}")
    found = sizes_of(directory)
    for name in dict.fromkeys((*needed, *told.sizes)):
        if name not in told.sizes or found.get(name) != told.sizes[name]:
            here = f"{found[name]} bytes" if name in found else "nothing"
            wanted = told.sizes.get(name, "an unknown number of")
            raise Corrupt(f"{directory} has {here} of {name}, which has {wanted} bytes")
    return told
