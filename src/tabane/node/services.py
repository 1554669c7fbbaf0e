"""The hub's sockets for this node's instances: which there are to be, and telling the hub.

The hub forgets them when it restarts, and keeps them when the agent does. So the agent says all of
them again on each session: what is there already stays as it is, sessions included.
"""

from __future__ import annotations

import logging
from pathlib import Path

from tabane.errors import Closed, TabaneError, Unavailable
from tabane.middlecon import Client
from tabane.model import InstanceId
from tabane.runtimes.api import HUB_SOCKET, InstanceSpec

log = logging.getLogger(__name__)


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
