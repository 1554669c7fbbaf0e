"""The tools' way to a cluster: any node's API, over its unix socket.

Questions are asked in HTTP/1.0, whose answer ends with the connection: that takes ten lines, and
http.client takes 30 ms to import, a third of what `tabane ps` may take in all. Everything else
goes through http.client.
"""

from __future__ import annotations

import json
import os
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tabane.clock import SYSTEM
from tabane.errors import Corrupt, NotFound, ProtocolError, TabaneError, Unreachable
from tabane.unix import connect_unix

if TYPE_CHECKING:
    from http.client import HTTPResponse

QUESTION_TIMEOUT_S = 10.0
ALIVE_S = 1.0
"""For a node to answer anything at all, where another could be asked instead."""
HUNG_S = 30.0
"""So long, a node that has not done so is asked last, by all commands."""
ACTION_TIMEOUT_S = 70.0
BLOCK_BYTES = 1 << 16
OK = range(200, 300)
LENGTH = re.compile(rb"\r\ncontent-length: *([0-9]+)(?:\r\n|$)", re.IGNORECASE)


class Cluster:
    """A local cluster below `root`. Requests go to the first node that answers, or a named one.

    Where there is a choice, a node is first asked for a sign of life, since one that hangs accepts
    connections all the same, and what it was sent may be done later.
    """

    def __init__(self, root: Path | None) -> None:
        self.root = root or default_root()
        self._answered = ""
        file = self.root / "cluster.json"
        try:
            self.config: dict[str, Any] = json.loads(file.read_bytes())
            self.nodes = [f"{node['datacenter']}/{node['name']}" for node in self.config["nodes"]]
        except (FileNotFoundError, NotADirectoryError):
            problem = (
                f"no cluster below {self.root}: start one with `tabane up`, or name its --root"
            )
            raise NotFound(problem) from None
        except (ValueError, LookupError, TypeError):
            raise Corrupt(f"{file} does not describe a cluster: is it another's file?") from None

    def socket_of(self, node: str) -> Path:
        return self.root / "nodes" / node / "api.sock"

    def get(self, path: str, *, node: str | None = None) -> Any:
        """Ask. A node that hangs costs `ALIVE_S`, one that does not answer in time its deadline;
        then the next is asked."""
        return _parse(self.get_bytes(path, node=node))

    def get_bytes(self, path: str, *, node: str | None = None) -> bytes:
        """As `get`, of an answer that is not JSON."""
        problems: dict[str, str] = {}
        for name in self._alive_first(self._choose(node), problems):
            try:
                status, body = ask(self.socket_of(name), path, QUESTION_TIMEOUT_S)
            except OSError as error:
                problems[name] = _reason(error)
                continue
            self._answered = name
            if status not in OK:
                raise error_of(status, body)
            return body
        raise self._unreachable(problems)

    def post(
        self,
        path: str,
        body: Any = None,
        *,
        node: str | None = None,
        timeout_s: float = ACTION_TIMEOUT_S,
    ) -> Any:
        data = json.dumps(body).encode()
        return _parse(self.request("POST", path, data, node=node, timeout_s=timeout_s))

    def delete(self, path: str) -> Any:
        return _parse(self.request("DELETE", path))

    def request(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None = None,
        *,
        node: str | None = None,
        timeout_s: float = ACTION_TIMEOUT_S,
    ) -> bytes:
        """The body of a successful answer. Raises the error that the node answered with."""
        name, response = self._open(method, path, body, node, timeout_s)
        with response, _breaking_off(name, method):
            return response.read()

    @contextmanager
    def stream(
        self, path: str, *, node: str | None = None, or_any: bool = False, body: Any = None
    ) -> Iterator[Iterator[bytes]]:
        """An answer's lines, as they come; the node has the question when the block begins. With a
        `body` it is a POST. `or_any`: as of `connect`."""
        method, data = ("GET", None) if body is None else ("POST", json.dumps(body).encode())
        name, response = self._open(method, path, data, node, None, or_any=or_any)
        with response:
            yield _lines(name, response)

    def _open(
        self,
        method: str,
        path: str,
        body: bytes | Iterator[bytes] | None,
        node: str | None,
        timeout_s: float | None,
        *,
        or_any: bool = False,
    ) -> tuple[str, HTTPResponse]:
        """The node that was asked, and its answer from the body on."""
        from http.client import HTTPConnection

        name, sock = self.connect(node, or_any=or_any)
        sock.settimeout(timeout_s)
        connection = HTTPConnection("localhost")
        connection.sock = sock
        headers = {"Connection": "close"}
        if isinstance(body, bytes):
            headers["Content-Type"] = "application/json"
        with sock, _breaking_off(name, method):  # an answer that is not yet read keeps it open
            with suppress(BrokenPipeError, ConnectionResetError):  # it may have answered early
                connection.request(method, _quote(path), body, headers)
            response = connection.getresponse()
            if response.status not in OK:
                with response:
                    raise error_of(response.status, response.read())
        return name, response

    def connect(self, node: str | None, *, or_any: bool = False) -> tuple[str, socket.socket]:
        """A node, and a connection to it. `or_any`: any other will do, too, since it passes on what
        it is asked about an instance."""
        problems: dict[str, str] = {}
        others = [name for name in self.nodes if node not in (None, name)] if or_any else []
        for name in self._alive_first([*self._choose(node), *others], problems):
            try:
                return name, connect_unix(self.socket_of(name), QUESTION_TIMEOUT_S)
            except OSError as error:
                problems[name] = _reason(error)
        raise self._unreachable(problems)

    def candidates(self) -> list[str]:
        """All nodes, in the order to try them: first the one that has answered, last those that
        hung a short while ago."""
        return sorted(self.nodes, key=lambda name: (name != self._answered, self._hung(name)))

    def _alive_first(self, names: list[str], problems: dict[str, str]) -> Iterator[str]:
        """Those of the names that show life, in their order; then those that showed none in time,
        which may only be slow. `problems`: why others are left out."""
        slow = []
        for name in names:
            if name == self._answered or len(names) == 1:
                yield name
                continue
            try:
                ask(self.socket_of(name), "/", ALIVE_S)
            except TimeoutError:
                slow.append(name)
                self._note_hung(name)
            except OSError as error:
                problems[name] = _reason(error)
            else:
                self._answered = name
                yield name
        yield from slow

    def _hung_mark(self, node: str) -> Path:
        return self.root / "nodes" / node / "hung"

    def _hung(self, node: str) -> bool:
        try:
            return SYSTEM.wall() - self._hung_mark(node).stat().st_mtime < HUNG_S
        except OSError:
            return False

    def _note_hung(self, node: str) -> None:
        with suppress(OSError):  # only its owner may write there; others find out for themselves
            self._hung_mark(node).touch()

    def _choose(self, node: str | None) -> list[str]:
        """The nodes to try: all, or the named one (with its data center or without)."""
        if node is None:
            return self.candidates()
        found = [key for key in self.nodes if node in (key, key.partition("/")[2])]
        if not found:
            raise NotFound(f"there is no node {node!r}, only {', '.join(self.nodes)}")
        return found

    def _unreachable(self, problems: dict[str, str]) -> Unreachable:
        if not any((self.root / "nodes" / node / "process.json").exists() for node in self.nodes):
            return Unreachable(f"the cluster below {self.root} is stopped: `tabane up` starts it")
        told = "; ".join(f"{node}: {problem}" for node, problem in problems.items())
        return Unreachable(f"no answer from the cluster below {self.root} ({told})")


@contextmanager
def _breaking_off(name: str, method: str = "GET") -> Iterator[None]:
    """What ends a connection in the middle is said in the node's name, and what that means for an
    action."""
    from http.client import HTTPException, IncompleteRead

    try:
        yield
    except (OSError, HTTPException) as error:
        is_cut = isinstance(error, IncompleteRead)
        reason = "it ended or restarted within its answer" if is_cut else _reason(error)
        what = "broke off" if method == "GET" else "did not say whether it was done"
        raise Unreachable(f"{name} {what}: {reason}") from error


def _lines(name: str, response: HTTPResponse) -> Iterator[bytes]:
    """By `read1`: what iterates a response takes a chunked body that breaks off for its end."""
    rest = b""
    while True:
        with _breaking_off(name):
            block = response.read1(BLOCK_BYTES)
        if not block:
            break
        *lines, rest = (rest + block).split(b"\n")
        yield from (line + b"\n" for line in lines)
    if rest:
        yield rest


def ask(path: Path, target: str, timeout_s: float) -> tuple[int, bytes]:
    """One GET over a unix socket: status and body, all within a deadline. Raises `OSError`."""
    deadline = SYSTEM.now() + timeout_s
    with connect_unix(path, timeout_s) as sock:
        sock.sendall(f"GET {_quote(target)} HTTP/1.0\r\nHost: localhost\r\n\r\n".encode())
        blocks = []
        while block := sock.recv(BLOCK_BYTES):
            blocks.append(block)
            if (left_s := deadline - SYSTEM.now()) <= 0:
                raise TimeoutError("timed out")
            sock.settimeout(left_s)
    head, _, body = b"".join(blocks).partition(b"\r\n\r\n")
    words = head.split(b" ", 2)
    if len(words) < 2 or not words[1].isdigit():
        raise ConnectionResetError("it broke off before it answered")
    length = LENGTH.search(head)
    if length is None or int(length[1]) != len(body):
        raise ConnectionResetError("it broke off within its answer")
    return int(words[1]), body


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _parse(body: bytes) -> Any:
    try:
        return json.loads(body)
    except ValueError:
        raise ProtocolError("a node's answer is not JSON: is it of another version?") from None


def _quote(target: str) -> str:
    if target.isascii() and target.isprintable() and " " not in target:
        return target
    from urllib.parse import quote

    return quote(target, safe="/?&=:,%", errors="surrogateescape")


def error_of(status: int, body: bytes) -> TabaneError:
    """What a node's answer means."""
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
