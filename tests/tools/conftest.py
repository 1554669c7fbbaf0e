"""A cluster of nodes that answer, over real sockets, what a test tells them to."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

Answer = bytes | Callable[[str, bytes], bytes]
"""What goes onto the connection: for any request, or made of its first line and body."""


def reply(value: Any, status: int = 200) -> bytes:
    """A whole answer with a value as its JSON."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


class Handler(socketserver.StreamRequestHandler):
    server: Node

    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()
        head = b"".join(iter(self.rfile.readline, b"\r\n")).decode().lower()
        _, named, length = head.partition("content-length: ")
        body = self.rfile.read(int(length.split()[0])) if named else b""
        self.server.asked.append((line.rpartition(" ")[0], body))
        answer = self.server.answer
        if answer is None:
            self.server.over.wait()
        else:
            self.wfile.write(answer if isinstance(answer, bytes) else answer(line, body))


class Node(socketserver.ThreadingUnixStreamServer):
    """One node; `answer` None: it takes connections and is silent. `asked`: lines and bodies."""

    def __init__(self, directory: Path, answer: Answer | None) -> None:
        directory.mkdir(parents=True)
        self.answer = answer
        self.asked: list[tuple[str, bytes]] = []
        self.over = threading.Event()
        descriptor = os.open(directory, os.O_RDONLY)
        super().__init__(f"/proc/self/fd/{descriptor}/api.sock", Handler)
        os.close(descriptor)
        self._thread = threading.Thread(target=self.serve_forever, args=(0.005,))
        self._thread.start()

    def close(self) -> None:
        self.over.set()
        self.shutdown()
        self._thread.join()
        self.server_close()


class Pretended:
    """A cluster's directory; nodes without an answer are in it, but do not run."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.nodes: dict[str, Node] = {}

    def begin(self, **answers: Answer | None) -> None:
        """Have these nodes, each in a data center of its name; an empty answer: it is down."""
        for name, answer in answers.items():
            if answer != b"":
                self.nodes[name] = Node(self.root / "nodes" / name / f"{name}-1", answer)
        nodes = [{"datacenter": name, "name": f"{name}-1"} for name in answers]
        (self.root / "cluster.json").write_text(json.dumps({"nodes": nodes}))

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()


@pytest.fixture
def pretended(tmp_path: Path) -> Iterator[Pretended]:
    cluster = Pretended(tmp_path)
    yield cluster
    cluster.close()
