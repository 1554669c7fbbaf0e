"""How an instance ended, written down for those who ask later: `exit.json` in its directory."""

from __future__ import annotations

from pathlib import Path

import msgspec

from tabane.model import ExitStatus
from tabane.runtimes.api import Handle
from tabane.runtimes.spawned import directory_of


def end_file(handle: Handle) -> Path:
    return directory_of(handle) / "exit.json"


def read_end(handle: Handle) -> ExitStatus | None:
    """None: nobody has seen it end."""
    try:
        return msgspec.json.decode(end_file(handle).read_bytes(), type=ExitStatus)
    except FileNotFoundError:
        return None


def write_end(handle: Handle, status: ExitStatus) -> None:
    fresh = end_file(handle).with_suffix(".new")
    fresh.write_bytes(msgspec.json.encode(status))
    fresh.rename(end_file(handle))
