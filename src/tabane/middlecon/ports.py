"""Outboxes: a session or link as the decisions see it; without IO."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, NamedTuple

from tabane.middlecon.backlog import Backlog

if TYPE_CHECKING:
    from tabane.middlecon.rooms import Member, Room
    from tabane.middlecon.tallies import Book


class Port:
    """One session or link as the decisions see it: a name and an outbox.

    `wake` is called when the empty outbox gets its first frame. `backlog` is what the shell could
    not write yet, in bytes; it lies in `queue`, as far as the shell did not hand it on. `dropped`
    counts casts that were given up because of it. `allowed` is how much of it the hub has to say
    whatever waits, which nobody is cut off for.
    """

    __slots__ = ("allowed", "backlog", "calls", "dropped", "name", "out", "queue", "urgent", "wake")

    def __init__(self, name: str, wake: Callable[[], None]) -> None:
        self.name = name
        self.wake = wake
        self.out: list[bytes] = []
        self.urgent: list[bytes] = []
        """Leaves before what is in `out`."""
        self.calls: Book = {}
        """Pending messages to one member that it is the origin or the target of."""
        self.backlog = 0
        self.allowed = 0
        self.queue: Backlog | None = None
        self.dropped = 0

    def send(self, frame: bytes) -> None:
        if not self.out:
            self.wake()
        self.out.append(frame)

    def tell(self, frame: bytes) -> None:
        """Send a part of what it must know at once, however much that is in all."""
        self.allowed += len(frame)
        self.send(frame)

    def send_first(self, frame: bytes) -> None:
        """Send before all that waits and is not urgent."""
        if not self.urgent:
            self.wake()
        self.urgent.append(frame)


def fan_out(ports: Iterable[Port], frame: bytes, limit: int) -> list[Port]:
    """Send a frame to all but those for whom more than `limit` bytes wait, which are returned."""
    slow = []
    for port in ports:
        if port.backlog > limit:
            slow.append(port)
            continue
        out = port.out  # as `port.send`, without a call for each
        if not out:
            port.wake()
        out.append(frame)
    return slow


class SessionPort(Port):
    """A member's session. `run` marks this run of its program. `rooms` are those it joined, as
    member or not, by number; `left` those it left while messages there were pending."""

    __slots__ = ("left", "member", "rooms", "run")
    member: Member

    def __init__(self, name: str, wake: Callable[[], None], run: int = 0) -> None:
        super().__init__(name, wake)
        self.run = run
        self.rooms: dict[int, Room] = {}
        self.left: dict[Room, None] = {}


class LinkPort(Port):
    """A link to the hub `name` in `datacenter`, of which `instance` is the running one."""

    __slots__ = (
        "awaited",
        "datacenter",
        "hubs",
        "instance",
        "members",
        "shadowed",
        "synced",
        "tellings",
    )

    def __init__(
        self, name: str, wake: Callable[[], None], instance: str = "", datacenter: str = ""
    ) -> None:
        super().__init__(name, wake)
        self.instance = instance
        self.datacenter = datacenter
        self.hubs: dict[str, Reach] = {}
        """The hubs behind it that it told of."""
        self.members: dict[str, Member] = {}
        """Those that it told of: its own, and those of the hubs behind it."""
        self.shadowed: set[str] = set()
        """Hubs that it told of, or led to, which are reached in another way by now."""
        self.awaited: set[str] = set()
        """Hubs that it was asked to tell of again, as they are not reached that way any more."""
        self.synced = False
        """It has told everything, and has not been asked to tell it again."""
        self.tellings = 1
        """How often it will still say that it has told everything."""

    def disbelieves(self, hub: str) -> bool:
        """Whether what it says of that hub's members counts for nothing."""
        return hub in self.shadowed or hub in self.awaited


class Reach(NamedTuple):
    """Whether a hub can be reached, over how many links, and where it is."""

    open: bool
    distance: int
    datacenter: str


def passes(source: Port | None, link: LinkPort) -> bool:
    """Whether what came from `source` goes on over `link`: never into the data center it came
    from. Hubs of one data center are all linked to each other, and the links between data centers
    are a tree, so everything reaches every hub once."""
    return not isinstance(source, LinkPort) or source.datacenter != link.datacenter
