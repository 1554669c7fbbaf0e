"""A conversation with an instance: the tools' end of what `tabane.api.frames` describes."""

from __future__ import annotations

import json
import select
import socket
from typing import TYPE_CHECKING, Any, NoReturn

from httptools import HttpParserError, HttpResponseParser

from tabane.api import frames
from tabane.errors import ProtocolError, Unreachable
from tabane.tools.client import OK, error_of

if TYPE_CHECKING:
    from tabane.tools.client import Cluster

BLOCK_BYTES = 64 << 10
BEGIN_S = 30.0
"""For a node to begin. It takes tens of milliseconds where nothing is wrong."""
HEAD = (
    "POST {} HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n"
)


class Talk:
    """Says and hears frames. `fileno()` is readable when there is something to hear; `credit`: how
    many bytes of input the node takes now. `passed`: the bytes of input and output so far."""

    def __init__(self, name: str, sock: socket.socket) -> None:
        self.credit = frames.WINDOW
        self.passed = 0
        self.is_over = False
        self._name = name
        self._sock = sock
        self._http = HttpResponseParser(self)
        self._frames = frames.Parser(frames.NODES)
        self._body: list[bytes] = []
        self._is_complete = False

    def fileno(self) -> int:
        return self._sock.fileno()

    def begin(self, path: str, what: dict[str, Any]) -> None:
        self._send(HEAD.format(path).encode())
        self.say(frames.encode(frames.BEGIN, json.dumps(what).encode()))

    def say(self, frame: bytes) -> None:
        self._send(b"%x\r\n%s\r\n" % (len(frame), frame))

    def give(self, data: bytes) -> None:
        """Input, no more than `credit` of it; nothing: its end."""
        self.credit -= len(data)
        self.passed += len(data)
        self.say(frames.encode(frames.INPUT if data else frames.END, data))

    def _send(self, data: bytes) -> None:
        try:
            self._sock.sendall(data)
        except (BrokenPipeError, ConnectionResetError):
            return  # why is to be heard

    def hear(self) -> list[frames.Frame]:
        """Wait for frames, and return those that came. Raises what the node answers instead of any,
        or says at the end, and `Unreachable` when it breaks off. After X `is_over`."""
        try:
            data = self._sock.recv(BLOCK_BYTES)
        except ConnectionError:
            data = b""
        if not data:
            self._break_off()
        try:
            self._http.feed_data(data)
        except HttpParserError as error:
            raise ProtocolError(f"{self._name} does not speak HTTP: {error}") from None
        body, self._body = b"".join(self._body), []
        status = self._http.get_status_code()
        if status and status not in OK:
            self._body = [body]
            if self._is_complete:
                raise error_of(status, body)
            return []
        heard = [frame for frame in self._frames.feed(body) if not self._note(*frame)]
        if self._is_complete and not self.is_over:
            self._break_off()
        return heard

    def _note(self, kind: bytes, data: bytes) -> bool:
        """What concerns the conversation itself."""
        if kind == frames.CREDIT:
            self.credit += frames.parse_number(data)
        elif kind == frames.OUTPUT:
            self.passed += len(data)
        elif kind == frames.FAILURE:
            raise error_of(500, data)
        self.is_over = self.is_over or kind == frames.EXIT
        return kind == frames.CREDIT

    def _break_off(self) -> NoReturn:
        problem = "it or its agent ended or restarted, and what ran for this command ended, too"
        raise Unreachable(f"{self._name} broke off: {problem}")

    def close(self) -> None:
        """Whatever still runs for it ends."""
        self._sock.close()

    def on_body(self, body: bytes) -> None:
        """(called by the parser)"""
        self._body.append(body)

    def on_message_complete(self) -> None:
        """(called by the parser)"""
        self._is_complete = True


def open_talk(cluster: Cluster, path: str, what: dict[str, Any], node: str) -> Talk:
    """Ask that node, or when it cannot be reached any other, which passes it on; and wait until it
    has begun. Raises `Unreachable` when it does not, as one that hangs."""
    name, sock = cluster.connect(node, or_any=True)
    sock.settimeout(None)
    talk = Talk(name, sock)
    talk.begin(path, what)
    answers = select.poll()
    answers.register(sock, select.POLLIN)
    if not answers.poll(BEGIN_S * 1000):
        talk.close()
        raise Unreachable(f"{name} has not begun it within {BEGIN_S:g} s: does {node} hang?")
    return talk
