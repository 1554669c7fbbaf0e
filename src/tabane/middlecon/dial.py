"""Dialing a hub: one attempt (`dial`), and the pauses between attempts (`pauses`)."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable, Iterator

from tabane.errors import Closed, TabaneError, TimedOut, Unreachable
from tabane.middlecon.addresses import Address, Unix
from tabane.middlecon.frames import Frame
from tabane.middlecon.session import Hello, Session, Side, Welcome, encode_hello, parse_welcome
from tabane.middlecon.wire import Flusher, Wire
from tabane.unix import connect_unix

FIRST_PAUSE_S = 0.05
LAST_PAUSE_S = 2.0
"""A hub that restarts is back within a second; 2 s bound how much later one finds it."""
DIAL_TIMEOUT_S = 5.0

Adopt = Callable[[Wire, Welcome], None]


def pauses() -> Iterator[float]:
    """Growing pauses with jitter, so that those who lost a hub together do not return together."""
    pause_s = FIRST_PAUSE_S
    while True:
        yield pause_s * random.uniform(0.5, 1.0)
        pause_s = min(pause_s * 2, LAST_PAUSE_S)


class _Opening:
    """Waits for the answer to a HELLO. `adopt` takes the wire over before its next frame."""

    def __init__(self, adopt: Adopt) -> None:
        self._adopt = adopt
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def on_frame(self, wire: Wire, frame: Frame) -> None:
        if self.answer.done():
            return
        try:
            self._adopt(wire, parse_welcome(frame))
        except TabaneError as error:
            self.answer.set_exception(error)
        else:
            self.answer.set_result(None)

    def on_lost(self, wire: Wire, error: TabaneError) -> None:
        if not self.answer.done():
            self.answer.set_exception(error)


async def dial(
    address: Address,
    hello: Hello,
    adopt: Adopt,
    flusher: Flusher,
    *,
    queue_bytes: int,
    turn: asyncio.Lock | None = None,
    check: Callable[[], None] = lambda: None,
) -> Wire:
    """Open a session. `adopt(wire, welcome)` sets the wire's handlers; it may raise to refuse.

    Those with the same `turn` say hello one after the other, and each only if `check` does not
    raise then; they connect, which may take long, at the same time.

    Raises `Unreachable`, `TimedOut`, `Closed`, or what the hub refused with. A failed or cancelled
    attempt leaves nothing open.
    """
    opening = _Opening(adopt)

    def make_wire() -> Wire:
        return Wire(
            Session(Side.DIALER),
            flusher,
            opening.on_frame,
            opening.on_lost,
            queue_bytes=queue_bytes,
        )

    wire: Wire | None = None
    try:
        async with asyncio.timeout(DIAL_TIMEOUT_S):
            wire = await _connect(address, make_wire)
            async with turn or contextlib.nullcontext():
                check()
                wire.begin(encode_hello(hello))
                await opening.answer
    except TimeoutError:
        _drop(wire)
        raise TimedOut(f"no hub answers at {address}") from None
    except OSError as error:
        raise Unreachable(f"no hub at {address}: {error.strerror or error}") from None
    except BaseException:
        opening.answer.cancel()  # nobody waits for it any more
        _drop(wire)
        raise
    return wire


def _drop(wire: Wire | None) -> None:
    if wire is not None:
        wire.lose(Closed("the attempt to open this session ended"))


async def _connect(address: Address, make_wire: Callable[[], Wire]) -> Wire:
    loop = asyncio.get_running_loop()
    if isinstance(address, Unix):
        sock = connect_unix(address.path, timeout_s=0)
        _, wire = await loop.create_unix_connection(make_wire, sock=sock)
    else:
        _, wire = await loop.create_connection(make_wire, address.host, address.port)
    return wire
