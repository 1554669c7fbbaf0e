"""A cluster of nodes that answer, over real sockets, what a test tells them to."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from tabane.tools.cli import run

Answer = bytes | Callable[[str, bytes], bytes | Iterator[bytes]]
"""What goes onto the connection: for any request, or made of its first line and body."""


def reply(value: Any, status: int = 200) -> bytes:
    """A whole answer with a value as its JSON."""
    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    return b"HTTP/1.1 %d OK\r\nContent-Length: %d\r\n\r\n%s" % (status, len(body), body)


SIGN_OF_LIFE = "GET / HTTP/1.0"


class Handler(socketserver.StreamRequestHandler):
    server: Node

    def handle(self) -> None:
        line = self.rfile.readline().decode().strip()
        if line == SIGN_OF_LIFE and self.server.answer is not None:
            self.wfile.write(reply({}))
            return
        head = b"".join(iter(self.rfile.readline, b"\r\n")).decode().lower()
        _, named, length = head.partition("content-length: ")
        body = self.rfile.read(int(length.split()[0])) if named else b""
        if "transfer-encoding: chunked" in head:
            size = int(self.rfile.readline(), 16)
            body = self.rfile.read(size)
        self.server.asked.append((line.rpartition(" ")[0], body))
        answer = self.server.answer
        if answer is None:
            self.server.over.wait()
        else:
            found = answer if isinstance(answer, bytes) else answer(line, body)
            with suppress(ConnectionError):
                for block in [found] if isinstance(found, bytes) else found:
                    self.wfile.write(block)


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
            directory = self.root / "nodes" / name / f"{name}-1"
            if answer != b"":
                self.nodes[name] = Node(directory, answer)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "process.json").write_text("{}")  # it was started
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


@pytest.fixture(autouse=True)
def no_stdin(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the tests are run with."""
    monkeypatch.setattr("sys.stdin", None)


# Commands

APP_FILE = 'name = "hello"\nimage = "host"\ncommand = ["true"]\n'
EVIL = "\x1b[2J\x9b31m\u202e\r\nx"


class Ended(NamedTuple):
    code: int
    out: str
    err: str


Run = Callable[..., Ended]


@pytest.fixture
def tabane(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Run:
    """Run a command on the cluster below `tmp_path`; what it says is safe to be shown."""

    def run_command(*argv: str) -> Ended:
        code = run(["--root", str(tmp_path), *argv])
        out, err = capsys.readouterr()
        assert all(line.isprintable() for line in (out + err).split("\n"))
        return Ended(code, out, err)

    return run_command


def failing(name: str, code: int) -> int:
    """What a command ends with where others do with 1 (failed) or 2 (the command line is wrong)."""
    if name in ("exec", "nice"):
        return 125
    return 3 if code == 1 and name in ("pgrep", "pkill", "pidof") else code


def check_refusal(ended: Ended, code: int, *words: str) -> None:
    assert ended.code == code
    assert ended.out == ""
    assert ended.err.startswith("tabane: ") and ended.err.endswith("\n")
    assert ended.err.count("\n") == 1
    for word in words:
        assert word in ended.err
