"""What precedes a TCP session's own bytes: between gateways, and to apps that ask who connects.

Without IO. A gateway that hands a session on writes one line, where it is to go as JSON (a `Hop`),
and waits for one line back: `ok`, after which the session's bytes pass both ways, or `no REASON`.
To apps goes, if they ask for it, the header of the PROXY protocol, version 1 or 2
(https://www.haproxy.org/download/2.8/doc/proxy-protocol.txt).
"""

from __future__ import annotations

import ipaddress
import struct

import msgspec

from tabane.errors import ProtocolError
from tabane.model import Value

LONGEST_LINE = 4096
OK = b"ok\n"
LONGEST_REASON = 1000
SIGNATURE = b"\r\n\r\n\x00\r\nQUIT\n"
PROXY = 0x21
"""Version 2, and "this connection was made for somebody else"."""
TCP_OVER = {4: 0x11, 6: 0x21}

Address = tuple[str, int]


class Hop(Value, frozen=True, forbid_unknown_fields=True):
    """Where another gateway wants a session to go: to `port` of the instance with that
    `generation`, or to whatever instance of the `app` (then `port` is the app's public one)."""

    token: str
    port: int
    generation: str = ""
    app: str = ""

    def fields(self) -> dict[bytes, bytes]:
        """As `Router.accept_forward` takes them."""
        said = {b"tabane-token": self.token, b"tabane-generation": self.generation}
        return {name: text.encode() for name, text in (said | {b"tabane-app": self.app}).items()}


def hop_of(headers: tuple[tuple[bytes, bytes], ...], port: int) -> Hop:
    """Of what a slot says that is another gateway's to serve."""
    said = {name: value.decode() for name, value in headers}
    generation, app = said.get(b"tabane-generation", ""), said.get(b"tabane-app", "")
    return Hop(said[b"tabane-token"], port, generation, app)


def encode_hop(hop: Hop) -> bytes:
    return msgspec.json.encode(hop) + b"\n"


def split_line(data: bytes) -> tuple[bytes, bytes] | None:
    """The first line, without its end, and what follows; None while it has not all come. Raises
    `ProtocolError` when it is too long."""
    line, end, rest = data.partition(b"\n")
    if len(line) > LONGEST_LINE:
        raise ProtocolError(f"its first line is longer than {LONGEST_LINE} bytes")
    return (line, rest) if end else None


def parse_hop(line: bytes) -> Hop:
    """Raises `ProtocolError`."""
    try:
        hop = msgspec.json.decode(line, type=Hop)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ProtocolError(f"this is not what a gateway says first: {error}") from None
    if not 1 <= hop.port <= 65535:
        raise ProtocolError(f"{hop.port} is no port")
    return hop


def encode_refusal(reason: str) -> bytes:
    """One line, whatever the reason says."""
    return b"no " + " ".join(reason.split()).encode()[:LONGEST_REASON] + b"\n"


def parse_reply(line: bytes) -> str:
    """Why it was refused; empty: it was not. Raises `ProtocolError`."""
    if line + b"\n" == OK:
        return ""
    word, _, reason = line.partition(b" ")
    if word != b"no":
        raise ProtocolError("this is not how a gateway answers another")
    return reason.decode(errors="replace") or "no reason was told"


def encode_proxy(version: str, client: Address, server: Address) -> bytes:
    """The header of the PROXY protocol `v1` or `v2`: who connected, and where."""
    source, target = (ipaddress.ip_address(host) for host, _ in (client, server))
    if version == "v1":
        words = ("PROXY", f"TCP{source.version}", source, target, client[1], server[1])
        return " ".join(map(str, words)).encode() + b"\r\n"
    body = source.packed + target.packed + struct.pack("!HH", client[1], server[1])
    kind = TCP_OVER[source.version]
    return SIGNATURE + struct.pack("!BBH", PROXY, kind, len(body)) + body
