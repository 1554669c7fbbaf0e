"""What a collector is: something that can be asked, now and then, for facts about what runs.

A collector knows nothing of intervals, deadlines or errors of others: `collect()` takes one reading
or raises. `tabane.k2i.collectors.runner` asks it, keeps what it said, and gives it up when it takes
too long; `tabane.k2i.collectors.registry` says which kinds there are.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from tabane.model import Collect

Value: TypeAlias = bool | int | float | str
Facts: TypeAlias = dict[str, Value]
"""By name, as `connections.waiting`."""
Streams: TypeAlias = tuple[asyncio.StreamReader, asyncio.StreamWriter]

MAX_FACTS = 512
"""In one reading."""
MAX_READINGS = 256
"""At once: each of a process is looked up, whenever somebody asks."""
MAX_NAME_BYTES = 128
MAX_TEXT_BYTES = 1024
MAX_ANSWER_BYTES = 256 << 10
"""Of what a program or a server writes in one reading; Redis's `INFO` has about 6 KiB."""


@dataclass(frozen=True)
class Reading:
    """Facts about one thing: the process `pid` of the node; without one the instance `instance`;
    without either what the collector was set up for, an instance or the node."""

    facts: Facts
    pid: int = 0
    instance: str = ""


class Dial(Protocol):
    """Opens connections from where the collector's subject is: the node, or inside an instance."""

    async def connect(self, url: str) -> Streams:
        """To `http://HOST[:PORT]`, `redis://HOST[:PORT]` or `unix:///PATH`. Raises `OSError`."""

    async def owner(self, streams: Streams) -> int:
        """Pid of the node's process that listens at the other end; 0 when that cannot be seen."""


class Collector(Protocol):
    """One configured collector. One `collect` at a time."""

    async def collect(self) -> list[Reading]:
        """One reading of each thing it knows facts about. Raises `TabaneError` or `OSError`. It is
        cancelled at its deadline, and must not block its thread."""

    async def aclose(self) -> None:
        """Let go of processes and connections it keeps. Idempotent."""


@dataclass(frozen=True)
class Setting:
    """What a collector is made of: what its user wrote, and where it looks from."""

    collect: Collect
    dial: Dial
    run: Callable[[tuple[str, ...], float], Awaitable[bytes]] = field(repr=False)
    """A command's stdout, given its words and the seconds it may take. Raises `TabaneError`."""


Maker: TypeAlias = Callable[[Setting], Collector]
