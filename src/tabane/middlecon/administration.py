"""What a node's agent tells its hub about programs in containers: the part of a client for that."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tabane.middlecon.connection import Connection
from tabane.middlecon.contained import SESSIONS, Served, encode_served
from tabane.middlecon.frames import ASLEEP, Kind
from tabane.middlecon.linking import Peer, encode_peers

ADMINISTRATION_TIMEOUT_S = 10.0


class Administration:
    """Needs root, or the hub's token. All methods raise `Denied` without, and `Closed`."""

    _connection: Connection

    async def serve(
        self,
        path: Path | str,
        *,
        name: str,
        rooms: Sequence[str],
        asleep: bool = False,
        sessions: int = SESSIONS,
    ) -> None:
        """Have the hub listen at the unix socket `path` for the programs of one container.

        Their member names begin with `name`, and they may be in `rooms` only (a `*` at the end of
        one stands for any end), with at most so many sessions. Idempotent: a repeat changes rooms,
        sessions and sleep. A hub that was started again has forgotten it: tell it again when
        `on_connected`. Raises `Refused` when the path cannot be had.
        """
        served = Served(str(path), tuple(rooms), asleep, sessions)
        await self._connection.request(
            Kind.SERVE, ADMINISTRATION_TIMEOUT_S, name=name, data=encode_served(served)
        )

    async def unserve(self, path: Path | str) -> None:
        """Close that socket, and the sessions that came through it. Idempotent."""
        await self._connection.request(
            Kind.UNSERVE, ADMINISTRATION_TIMEOUT_S, data=str(path).encode()
        )

    async def set_hubs(self, peers: Sequence[Peer]) -> None:
        """These are all the hubs there are. The members of one that is not among them have left,
        once the link to it is down. Raises `UsageError` for a bad URL."""
        await self._connection.request(
            Kind.HUBS, ADMINISTRATION_TIMEOUT_S, data=encode_peers(peers)
        )

    async def sleep(self, name: str, *, asleep: bool = True) -> None:
        """The members of the container served as `name` are frozen from now on, or not any more.

        What is said to one that sleeps goes nowhere, and the receipt says so at once. `name` may be
        a single member of this hub, too. Raises `NotFound` when there is neither.
        """
        flags = ASLEEP if asleep else 0
        await self._connection.request(Kind.SLEEP, ADMINISTRATION_TIMEOUT_S, flags=flags, name=name)
