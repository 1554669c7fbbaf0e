"""The tools' way to a cluster: any node's API, over its unix socket."""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any
from urllib.parse import quote

from tabane.errors import NotFound, Unreachable

TIMEOUT_S = 70.0


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket, whose path may be longer than the kernel's 108 bytes."""

    def __init__(self, path: Path, timeout_s: float = TIMEOUT_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        directory = os.open(self._path.parent, os.O_RDONLY | os.O_DIRECTORY)
        sock = socket.socket(socket.AF_UNIX)
        try:
            sock.settimeout(self.timeout)
            sock.connect(f"/proc/self/fd/{directory}/{self._path.name}")
        except OSError:
            sock.close()
            raise
        finally:
            os.close(directory)
        self.sock = sock


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
        return json.loads(self.request("GET", path, node=node))

    def post(self, path: str, body: Any = None, *, node: str | None = None) -> Any:
        return json.loads(self.request("POST", path, json.dumps(body).encode(), node=node))

    def delete(self, path: str) -> Any:
        return json.loads(self.request("DELETE", path))

    def request(
        self,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None = None,
        *,
        node: str | None = None,
    ) -> bytes:
        """The body of a successful answer. Raises the error that the node answered with."""
        with self._open(method, path, body, node) as response:
            return response.read()

    def stream(self, path: str, *, node: str | None = None) -> Iterator[bytes]:
        """An answer line by line, as it comes."""
        with self._open("GET", path, None, node) as response:
            yield from response

    def _open(
        self, method: str, path: str, body: bytes | IO[bytes] | None, node: str | None
    ) -> http.client.HTTPResponse:
        last: OSError | http.client.HTTPException | None = None
        for name in [node] if node is not None else self.nodes:
            connection = UnixConnection(self.socket_of(name))
            try:
                connection.connect()
            except (OSError, TimeoutError) as error:
                last = error
                continue
            return self._ask(connection, method, path, body, name)
        who = node or "any node"
        raise Unreachable(f"{who} of the cluster below {self.root} cannot be reached: {last}")

    def _ask(
        self,
        connection: UnixConnection,
        method: str,
        path: str,
        body: bytes | IO[bytes] | None,
        node: str,
    ) -> http.client.HTTPResponse:
        headers = {"Content-Type": "application/json"} if isinstance(body, bytes) else {}
        try:
            connection.request(method, quote(path, safe="/?&=:,"), body, headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            raise Unreachable(f"{node} broke off: {error or type(error).__name__}") from error
        if response.status >= 400:
            from tabane.api.problems import parse_body

            raise parse_body(response.status, _parse(response.read()))
        return response


def default_root() -> Path:
    """`$TABANE_ROOT`, else `tabane` in the XDG state directory."""
    if given := os.environ.get("TABANE_ROOT"):
        return Path(given)
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return Path(state) / "tabane"


def _parse(data: bytes) -> dict[str, Any]:
    try:
        body = json.loads(data)
    except ValueError:
        return {}
    return body if isinstance(body, dict) else {}
