"""A hub's standing link to one peer.

Both hubs of a pair may dial; one link is enough. A hub refuses a peer's HELLO while it has a link
to it, and the one with the smaller name also while its own attempt is under way: so of two attempts
made at the same time, that of the smaller name survives.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

from tabane.errors import Conflict, TabaneError
from tabane.middlecon.addresses import Address
from tabane.middlecon.dial import Adopt, dial, pauses
from tabane.middlecon.session import Hello
from tabane.middlecon.wire import Flusher

log = logging.getLogger(__name__)


class Link:
    """Dials `peer` whenever there is no link to it, whoever opened the last one.

    `linked()` says whether there is one; `down` is set by the hub when it is lost. `trouble` says
    why the last attempt failed; it is logged, unless there is a link already. Those with the same
    `turn` say hello one at a time.
    """

    def __init__(
        self,
        peer: str,
        address: Address,
        hello: Hello,
        adopt: Adopt,
        linked: Callable[[], bool],
        flusher: Flusher,
        *,
        queue_bytes: int,
        turn: asyncio.Lock | None = None,
    ) -> None:
        self.peer = peer
        self.dialing = False
        self.down = asyncio.Event()
        self.trouble = ""
        self._address = address
        self._hello = hello
        self._adopt = adopt
        self._linked = linked
        self._flusher = flusher
        self._queue_bytes = queue_bytes
        self._turn = turn

    async def run(self) -> None:
        """Ends only by being cancelled."""
        while True:
            for pause_s in pauses():
                if not self._linked():
                    await self._attempt()
                if self._linked():
                    break
                await asyncio.sleep(pause_s)
            self.down.clear()
            if self._linked():
                await self.down.wait()
            await asyncio.sleep(next(pauses()))

    async def _attempt(self) -> None:
        self.dialing = True
        try:
            await dial(
                self._address,
                self._hello,
                self._adopt,
                self._flusher,
                queue_bytes=self._queue_bytes,
                turn=self._turn,
                check=self._check,
            )
            self.trouble = ""
        except TabaneError as error:
            if error.message != self.trouble and not isinstance(error, Conflict):
                log.warning("no link to hub %s: %s", self.peer, error.message)
            self.trouble = error.message
        finally:
            self.dialing = False

    def _check(self) -> None:
        if self._linked():
            raise Conflict(f"hub {self.peer} is linked, or reached in another way, by now")
