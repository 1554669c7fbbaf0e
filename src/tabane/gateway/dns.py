"""The resolver of a node's instances: apps by name, and the outside for those that may go there.

Names of apps lead to the gateway's inside address, so that calling an app by its name wakes it.
Everything else goes to the node's own resolvers, if the one who asks has egress. It listens on UDP
and TCP on the node's address in the instance network; the packet filter lets instances in there.
"""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

from tabane.errors import ProtocolError
from tabane.gateway import dns_message as dns
from tabane.gateway.dns_message import Code, Query
from tabane.network.addresses import GATEWAY, has_egress
from tabane.supervise import Supervisor

DOMAIN = "tabane"
"""`NAME.NAMESPACE.tabane` and `NAME.tabane` are apps; nothing under it is asked elsewhere."""
PORT = 53
UPSTREAM_TIMEOUT_S = 2.0
STREAM_TIMEOUT_S = 10.0
MAX_IN_FLIGHT = 512
"""Questions to upstream at once; more are answered with a failure, which clients repeat."""
MAX_STREAMS = 16
"""TCP connections of one source at a time: a resolver needs one or two, and each costs the gateway,
which serves all, a descriptor."""

_RESOLV_CONF = Path("/etc/resolv.conf")
_SYSTEMD_RESOLV_CONF = Path("/run/systemd/resolve/resolv.conf")

Upstream = tuple[str, int]


def find_upstreams(*files: Path) -> tuple[Upstream, ...]:
    """The name servers of the first of `files` that names one which is not on loopback.

    By default /etc/resolv.conf, then systemd-resolved's own list, since a stub on the machine's
    loopback cannot be reached from a node in a namespace.
    """
    for file in files or (_RESOLV_CONF, _SYSTEMD_RESOLV_CONF):
        if file.exists():
            words = [line.split() for line in file.read_text().splitlines()]
            hosts = [pair[1] for pair in words if len(pair) > 1 and pair[0] == "nameserver"]
            outside = [host for host in hosts if not host.startswith("127.") and host != "::1"]
            if outside:
                return tuple((host, PORT) for host in outside)
    return ()


class Resolver(asyncio.DatagramProtocol):
    """`is_app(name)` says whether a name (lower case, no last dot) leads to an app.

    Use `answer`, or as the protocol of a UDP endpoint and `serve_stream` as a TCP server's
    callback. `tasks` owns the questions under way.
    """

    def __init__(
        self,
        is_app: Callable[[str], bool],
        tasks: Supervisor,
        *,
        upstreams: Sequence[Upstream] = (),
        may_leave: Callable[[str], bool] = has_egress,
    ) -> None:
        self._is_app = is_app
        self._tasks = tasks
        self._upstreams = tuple(upstreams)
        self._may_leave = may_leave
        self._in_flight = 0
        self._streams: Counter[str] = Counter()
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.DatagramTransport, transport)

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        decided = self.decide(data, addr[0])
        if isinstance(decided, Query):
            self._tasks.start("dns question", self._answer_datagram(decided, data, addr))
        elif decided is not None:
            self._send(decided, addr)

    async def _answer_datagram(self, query: Query, data: bytes, addr: tuple[str, int]) -> None:
        self._send(await self.forward(query, data, stream=False), addr)

    def _send(self, response: bytes, addr: tuple[str, int]) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.sendto(response, addr)

    async def serve_stream(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        """One TCP connection: messages with their length before them, one after the other."""
        source = writer.get_extra_info("peername")[0]
        if self._streams[source] >= MAX_STREAMS:
            writer.transport.abort()
            return
        self._streams[source] += 1
        try:
            async with asyncio.timeout(STREAM_TIMEOUT_S) as deadline:
                while True:
                    data = await _read_message(reader)
                    response = self.decide(data, source)
                    if isinstance(response, Query):
                        response = await self.forward(response, data, stream=True)
                    if response is None:
                        return
                    writer.write(len(response).to_bytes(2, "big") + response)
                    await writer.drain()
                    deadline.reschedule(asyncio.get_running_loop().time() + STREAM_TIMEOUT_S)
        except (asyncio.IncompleteReadError, OSError):
            return  # the client has gone, or was silent for too long (TimeoutError is an OSError)
        finally:
            self._streams[source] -= 1
            if not self._streams[source]:
                del self._streams[source]
            writer.close()

    def decide(self, data: bytes, source: str) -> bytes | Query | None:
        """The response to a message, or None for none, or the query that is to be forwarded."""
        try:
            query = dns.parse_query(data)
        except ProtocolError:
            return dns.encode_format_error(data)
        if not query.is_standard:
            return dns.encode_failure(query, Code.NOT_IMPLEMENTED)
        if self._is_app(query.name):
            return dns.encode_answer(query, GATEWAY)
        if query.name == DOMAIN or query.name.endswith(f".{DOMAIN}"):
            return dns.encode_failure(query, Code.NO_SUCH_NAME)
        if not self._may_leave(source):
            return dns.encode_failure(query, Code.REFUSED)
        return query

    async def forward(self, query: Query, data: bytes, *, stream: bool) -> bytes:
        """What the first upstream that answers in time says, under the client's id."""
        if self._in_flight >= MAX_IN_FLIGHT:
            return dns.encode_failure(query, Code.SERVER_FAILURE)
        number = secrets.randbits(16)
        own = Query(number, query.flags, query.name, query.kind, query.question)
        ask = _ask_stream if stream else _ask_datagram
        self._in_flight += 1
        try:
            for upstream in self._upstreams:
                try:
                    async with asyncio.timeout(UPSTREAM_TIMEOUT_S):
                        response = await ask(upstream, own, dns.with_id(data, number))
                except (OSError, asyncio.IncompleteReadError):
                    continue  # silent (TimeoutError is an OSError), refused or cut off: the next
                return dns.with_id(response, query.id)
        finally:
            self._in_flight -= 1
        return dns.encode_failure(query, Code.SERVER_FAILURE)


class _Question(asyncio.DatagramProtocol):
    """Waits for the response to one query; what does not answer it is not heard."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self.response: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()

    def datagram_received(self, data: bytes, addr: tuple[str, int]) -> None:
        if not self.response.done() and dns.answers(self._query, data):
            self.response.set_result(data)

    def error_received(self, exc: Exception) -> None:
        if not self.response.done():
            self.response.set_exception(exc)


async def _ask_datagram(upstream: Upstream, query: Query, data: bytes) -> bytes:
    """Each question from a port of its own, which a forger would have to guess too."""
    loop = asyncio.get_running_loop()
    transport, question = await loop.create_datagram_endpoint(
        lambda: _Question(query), remote_addr=upstream
    )
    try:
        transport.sendto(data)
        return await question.response
    finally:
        transport.close()


async def _ask_stream(upstream: Upstream, query: Query, data: bytes) -> bytes:
    reader, writer = await asyncio.open_connection(*upstream)
    try:
        writer.write(len(data).to_bytes(2, "big") + data)
        response = await _read_message(reader)
    finally:
        writer.close()
    if not dns.answers(query, response):
        raise ConnectionError(f"{upstream[0]} answered another question")
    return response


async def _read_message(reader: asyncio.StreamReader) -> bytes:
    length = int.from_bytes(await reader.readexactly(2), "big")
    return await reader.readexactly(length)
