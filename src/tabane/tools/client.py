"""The tools' way to a cluster: any node's API, over its unix socket.

Questions are asked in HTTP/1.0, whose answer ends with the connection: that takes ten lines, and
http.client takes 30 ms to import, a third of what `tabane ps` may take in all. Everything else
goes through http.client.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabane.errors import NotFound, TabaneError, Unreachable

if TYPE_CHECKING:
    from http.client import HTTPResponse

QUESTION_TIMEOUT_S = 10.0
ACTION_TIMEOUT_S = 70.0
BLOCK_BYTES = 1 << 16


def connect_unix(path: Path, timeout_s: float) -> socket.socket:
    """Connect to a unix socket, whose path may be longer than the kernel's 108 bytes."""
    sock = socket.socket(socket.AF_UNIX)
    try:
        directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            sock.settimeout(timeout_s)
            sock.connect(f"/proc/self/fd/{directory}/{path.name}")
        finally:
            os.close(directory)
    except OSError:
        sock.close()
        raise
    return sock


class Cluster:
    """A local cluster below `root`. Requests go to the first node that answers, or a named one."""

    def __init__(self, root: Path | None) -> None:
        self.root = root or default_root()
        try:
            self.config: dict[str, Any] = json.loads((self.root / "cluster.json").read_bytes())
        except FileNotFoundError:
            problem = (
                f"no cluster below {self.root}: start one with `tabane up`, or name its --root"
            )
            raise NotFound(problem) from None
        self.nodes = [f"{node['datacenter']}/{node['name']}" for node in self.config["nodes"]]

    def socket_of(self, node: str) -> Path:
        return self.root / "nodes" / node / "api.sock"

    def get(self, path: str, *, node: str | None = None) -> Any:
        """Ask. A node that does not answer in time costs its deadline; then the next is asked."""
        problem = ""
        for name in [node] if node is not None else self.nodes:
            try:
                status, body = ask(self.socket_of(name), path)
            except OSError as error:
                problem = f"{name}: {error.strerror or error}"
                continue
            if status >= 400:
                raise _error_of(status, body)
            return json.loads(body)
        raise Unreachable(f"no node of the cluster below {self.root} answers ({problem})")

    def post(self, path: str, body: Any = None, *, node: str | None = None) -> Any:
        return json.loads(self.request("POST", path, json.dumps(body).encode(), node=node))

    def delete(self, path: str) -> Any:
        return json.loads(self.request("DELETE", path))

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        *,
        node: str | None = None,
    ) -> bytes:
        """The body of a successful answer. Raises the error that the node answered with."""
        with self._open(method, path, body, node) as response:
            return response.read()

    def stream(self, path: str, *, node: str | None = None) -> Iterator[bytes]:
        """An answer line by line, as it comes."""
        with self._open("GET", path, None, node, timeout_s=None) as response:
            yield from response

    def _open(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None,
        node: str | None,
        timeout_s: float | None = ACTION_TIMEOUT_S,
    ) -> HTTPResponse:
        from http.client import HTTPConnection, HTTPException

        name, sock = self._connect_any([node] if node is not None else self.nodes)
        sock.settimeout(timeout_s)
        connection = HTTPConnection("localhost")
        connection.sock = sock
        headers = {"Connection": "close"}
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
        try:
            connection.request(method, _quote(path), body, headers)
            response = connection.getresponse()
        except (OSError, HTTPException) as error:
            connection.close()
            raise Unreachable(f"{name} broke off: {error or type(error).__name__}") from error
        if response.status >= 400:
            with response:
                raise _error_of(response.status, response.read())
        return response

    def _connect_any(self, nodes: list[str]) -> tuple[str, socket.socket]:
        problem = ""
        for name in nodes:
            try:
                return name, connect_unix(self.socket_of(name), QUESTION_TIMEOUT_S)
            except OSError as error:
                problem = f"{name}: {error.strerror or error}"
        raise Unreachable(f"no node of the cluster below {self.root} can be reached ({problem})")


def ask(path: Path, target: str) -> tuple[int, bytes]:
    """One GET over a unix socket: status and body. Raises `OSError`."""
    with connect_unix(path, QUESTION_TIMEOUT_S) as sock:
        sock.sendall(f"GET {_quote(target)} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        blocks = []
        while block := sock.recv(BLOCK_BYTES):
            blocks.append(block)
    head, _, body = b"".join(blocks).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        raise ConnectionResetError("it broke off before it answered")
    return int(words[1]), body


def _quote(target: str) -> str:
    if target.isascii() and target.isprintable() and " " not in target:
        return target
    from urllib.parse import quote

    return quote(target, safe="/?&=:,%")


def _error_of(status: int, body: bytes) -> TabaneError:
    from tabane.api.problems import parse_body

    try:
        fields = json.loads(body)
    except ValueError:
        fields = {}
    return parse_body(status, fields if isinstance(fields, dict) else {})


def default_root() -> Path:
    """`$TABANE_ROOT`, else `tabane` in the XDG state directory."""
    if given := os.environ.get("TABANE_ROOT"):
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tabane"
