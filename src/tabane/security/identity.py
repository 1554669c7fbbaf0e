"""Who is asking: every action carries a `Principal`.

On a unix socket the kernel says who it is (peer credentials). Elsewhere the cluster's token does.
Nothing that can signal or start a process listens without one of the two.
"""

from __future__ import annotations

import hmac
import os
import re
import secrets
import socket
import struct
from pathlib import Path

from tabane.errors import Denied, Unauthenticated
from tabane.model import Value

TOKEN_BYTES = 32
_PRINCIPAL = re.compile(r"(peer|token|member) (-1|\d{1,10}) (-1|\d{1,10}) (\d{1,10})")
_AUTHORITY = re.compile(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:,\[\]\s]*))(?::[0-9]*)?")


class Principal(Value, frozen=True):
    """`kind` is `peer` (a local user, by uid), `token` (holds the cluster's token) or `member` (a
    process of the cluster). `uid` is -1 where there is none."""

    kind: str
    uid: int = -1
    gid: int = -1
    pid: int = 0
    via: str = ""
    """The node that passed the request on, and says so; `pid` is one of its processes then."""

    @property
    def is_root(self) -> bool:
        """May do everything: the local root, the user who runs the cluster, the token's holder."""
        return self.kind in ("token", "member") or self.uid in (0, os.geteuid())


def peer_principal(sock: socket.socket) -> Principal:
    """The process at the other end of a unix socket."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    pid, uid, gid = struct.unpack("3i", raw)
    return Principal("peer", uid, gid, pid)


def encode_principal(who: Principal) -> str:
    """For the header with which a node says for whom it passes a request on."""
    return f"{who.kind} {who.uid} {who.gid} {who.pid}"


def parse_principal(text: str, via: str) -> Principal:
    """Who the node `via` says is asking. Raises `Denied`."""
    if not (found := _PRINCIPAL.fullmatch(text)):
        raise Denied(f"{via or 'nobody'} does not say for whom it passes this on")
    return Principal(found[1], int(found[2]), int(found[3]), int(found[4]), via)


def new_token() -> str:
    return secrets.token_urlsafe(TOKEN_BYTES)


def read_token(path: Path) -> str:
    """The cluster's token. Refuses a file that others may read, or that is empty."""
    if path.stat().st_mode & 0o077:
        raise Denied(f"{path} is readable by others: chmod 600 it, or make a new token")
    if not (token := path.read_text().strip()):
        raise Denied(f"{path} is empty: write a token into it that nobody can guess")
    return token


def check_bearer(authorization: str | None, token: str) -> Principal:
    """The principal of an `Authorization: Bearer TOKEN` header. Raises `Unauthenticated`."""
    scheme, _, given = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(
        given.strip().encode(), token.encode()
    ):
        raise Unauthenticated("this port wants the cluster's token: Authorization: Bearer TOKEN")
    return Principal("token")


def check_origin(headers: dict[str, str], allowed_hosts: frozenset[str]) -> None:
    """Refuse what a browser was tricked into sending: a foreign Host or Origin. Raises `Denied`.

    `headers` has lower-case names. `allowed_hosts` are host names and addresses without port.
    """
    host = _host_of(headers.get("host", ""))
    if host not in allowed_hosts:
        raise Denied(f"host {host!r} is not served by this control port")
    origin = headers.get("origin")
    if origin is not None and _host_of(origin.partition("://")[2]) not in allowed_hosts:
        raise Denied(f"origin {origin!r} may not use this control port")


def _host_of(authority: str) -> str:
    """Without its port; what is no authority is no host either, and stays as it is."""
    found = _AUTHORITY.fullmatch(authority)
    return (found[1] or found[2] or "").lower() if found else authority
