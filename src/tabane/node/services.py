"""The sockets that this node's instances are shown, as their apps ask for.

Those of middlecon are the hub's: it forgets them when it restarts, and keeps them when the agent
does. So the agent says all of them again on each session: what is there already stays as it is,
sessions included. Those of k2i and of leases are the agent's own, and made anew when it is started
again; what connects before it answers waits.
"""

from __future__ import annotations

import logging
import socket
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from tabane.errors import Closed, TabaneError, Unavailable
from tabane.middlecon import Client
from tabane.middlecon.addresses import Unix, listen_on
from tabane.model import InstanceId
from tabane.runtimes.api import HUB_SOCKET, K2I_SOCKET, LEASE_SOCKET, InstanceSpec

log = logging.getLogger(__name__)

EVERYONE = 0o666
"""In the instance: its directory lies where no other user of the node may enter."""
End = Callable[[], Awaitable[None]]
Serve = Callable[[socket.socket, InstanceSpec], Awaitable[End]]
"""Begin to answer at a listening socket of an instance; returns how to end that."""


def identity_of(spec: InstanceSpec) -> str:
    """What the names of an instance's members begin with."""
    return f"{spec.app.key}-{spec.id}"


def socket_of(spec: InstanceSpec) -> Path:
    assert spec.services is not None
    return spec.services / HUB_SOCKET


class HubSockets:
    """`restore` gives it a session with the hub; what is opened before waits for that."""

    def __init__(self) -> None:
        self._wanted: dict[InstanceId, InstanceSpec] = {}
        self._unwanted: set[Path] = set()
        """Closed while the hub could not be told."""
        self._me: Client | None = None

    async def open(self, spec: InstanceSpec) -> None:
        """Have an instance's socket there. Raises when the hub refuses; while there is no hub, its
        next start makes the socket."""
        self._wanted[spec.id] = spec
        try:
            if self._me is not None:
                await _serve(self._me, spec)
        except (Closed, Unavailable) as error:
            log.info("%s gets its socket when the hub is back: %s", spec.id, error)

    async def close(self, spec: InstanceSpec) -> None:
        """Take it away, with the sessions that came through it. Idempotent."""
        self._wanted.pop(spec.id, None)
        self._unwanted.add(socket_of(spec))
        await self._take_away()

    async def restore(self, me: Client) -> None:
        """There is a session: tell all."""
        self._me = me
        for spec in list(self._wanted.values()):
            try:
                await _serve(me, spec)
            except TabaneError as error:
                log.warning("%s has no socket of the hub: %s", spec.id, error)
        await self._take_away()

    async def _take_away(self) -> None:
        for path in tuple(self._unwanted):
            try:
                if self._me is None:
                    return
                await self._me.unserve(path)
            except (Closed, Unavailable):
                return  # a hub that starts again serves nothing that it is not told
            except TabaneError as error:
                log.warning("the hub keeps %s: %s", path, error)
            self._unwanted.discard(path)


async def _serve(me: Client, spec: InstanceSpec) -> None:
    await me.serve(socket_of(spec), name=identity_of(spec), rooms=spec.app.services.middlecon)


class OwnSockets:
    """Those that the agent itself answers at, one of that `name` for each instance. `attach` says
    who answers; what connects before that waits."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._serve: Serve | None = None
        self._listening: dict[InstanceId, tuple[InstanceSpec, socket.socket]] = {}
        self._ends: dict[InstanceId, End] = {}

    async def open(self, spec: InstanceSpec) -> None:
        """Have an instance's socket there."""
        path = self._path(spec)
        sock = listen_on(Unix(path))
        path.chmod(EVERYONE)
        self._listening[spec.id] = (spec, sock)
        await self._begin(spec.id)

    async def close(self, spec: InstanceSpec) -> None:
        """Take it away, with the connections that came through it. Idempotent."""
        await self._end(spec.id)
        with suppress(FileNotFoundError):
            self._path(spec).unlink()

    async def attach(self, serve: Serve) -> None:
        self._serve = serve
        for instance in tuple(self._listening):
            await self._begin(instance)

    async def aclose(self) -> None:
        """Answer no more; the files stay for the next agent. Idempotent."""
        for instance in tuple(self._listening):
            await self._end(instance)

    async def _begin(self, instance: InstanceId) -> None:
        if self._serve is not None:
            spec, sock = self._listening[instance]
            self._ends[instance] = await self._serve(sock, spec)

    async def _end(self, instance: InstanceId) -> None:
        if (end := self._ends.pop(instance, None)) is not None:
            await end()
        _, sock = self._listening.pop(instance, (None, None))
        if sock is not None:
            sock.close()

    def _path(self, spec: InstanceSpec) -> Path:
        assert spec.services is not None
        return spec.services / self._name


class NodeServices:
    """All that an app may ask for."""

    def __init__(self) -> None:
        self.hub = HubSockets()
        self.k2i = OwnSockets(K2I_SOCKET)
        self.lease = OwnSockets(LEASE_SOCKET)

    async def open(self, spec: InstanceSpec) -> None:
        """See `tabane.node.instances.Services`."""
        if spec.app.services.middlecon:
            await self.hub.open(spec)
        if spec.app.services.k2i:
            await self.k2i.open(spec)
        if spec.app.services.lease:
            await self.lease.open(spec)

    async def close(self, spec: InstanceSpec) -> None:
        """Idempotent."""
        if spec.app.services.middlecon:
            await self.hub.close(spec)
        if spec.app.services.k2i:
            await self.k2i.close(spec)
        if spec.app.services.lease:
            await self.lease.close(spec)
