"""`tabane logs`.

What a program writes is passed on as it is, colours and control characters too. Only a terminal
gets it with escapes for what is no text: whoever made the app write it is not who reads it.
"""

from __future__ import annotations

import argparse
import heapq
import json
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

from tabane.errors import TabaneError
from tabane.node.logfile import parse_line
from tabane.tools.cli.common import Parser, complain, printable, whole
from tabane.tools.cli.finding import find
from tabane.tools.client import Cluster

MOST_WAITING = 1000
"""Lines of all instances that are followed; who reads slowly holds the nodes up, not the memory."""

Line = tuple[str, bytes]
"""An instance's id (empty when it is the only one), and a line of its log."""


def logs(argv: list[str]) -> int:
    args = _parse(argv)
    cluster = Cluster(args.root)
    found = find(cluster, args.what, ended=True)
    show = _Show(args)
    with ExitStack() as streams:
        opened = []
        for instance in found:
            name = instance["id"] if len(found) > 1 else ""
            path = f"/api/v1/instances/{instance['id']}/log?{_query(args)}"
            stream = cluster.stream(path, node=instance["node"], or_any=True)
            opened.append(_named(name, streams.enter_context(stream)))
        if len(opened) == 1:
            for line in opened[0]:
                show(line)
            return 0
        if not args.follow:
            for line in heapq.merge(*opened, key=lambda line: line[1].partition(b" ")[0]):
                show(line)
            return 0
        return _follow(opened, show)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("logs", "What an instance wrote; also after its end, by its id.")
    parser.add_argument("what", help="an instance id, or an app's name")
    parser.add_argument("-f", "--follow", action="store_true", help="go on until it ends")
    parser.add_argument("-n", "--tail", type=whole(1), metavar="N", help="the last N lines")
    about = "only what is no older than 10m, 2h, ..., or than a moment as 2026-01-31T09:00:00Z"
    parser.add_argument("--since", metavar="WHEN", help=about)
    parser.add_argument("-t", "--timestamps", action="store_true")
    parser.add_argument("--json", action="store_true", help="one object a line")
    return parser.parse_args(argv)


def _query(args: argparse.Namespace) -> str:
    query = f"tail={args.tail or 0}&follow={str(args.follow).lower()}"
    if args.since is None:
        return query
    from urllib.parse import quote

    return f"{query}&since={quote(args.since, safe='')}"


def _named(name: str, lines: Iterator[bytes]) -> Iterator[Line]:
    for line in lines:
        yield name, line


def _follow(streams: list[Iterator[Line]], show: _Show) -> int:
    """All at once, in the order in which the lines come. One that breaks off is said, and the
    others go on."""
    from queue import Queue
    from threading import Thread

    queue: Queue[Line | str | None] = Queue(MOST_WAITING)

    def read(stream: Iterator[Line]) -> None:
        try:
            for line in stream:
                queue.put(line)
        except TabaneError as error:
            queue.put(error.message)
        queue.put(None)

    for stream in streams:
        Thread(target=read, args=(stream,), daemon=True).start()
    left, code = len(streams), 0
    while left:
        heard = queue.get()
        if heard is None:
            left -= 1
        elif isinstance(heard, str):
            complain(heard)
            code = 1
        else:
            show(heard)
    return code


class _Show:
    """Prints lines."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        self._open: tuple[str, str] | None = None
        """Whose line has begun here and is not at its end."""

    def __call__(self, line: Line) -> None:
        name, stored = line
        parsed = parse_line(stored)
        if parsed is None:
            return
        stamp, stream, is_whole, text = parsed
        if self._args.json:
            self._show_json(name, stamp, stream, is_whole, text)
            return
        out = sys.stderr if stream == "stderr" else sys.stdout
        source = (name, stream)
        head = b""
        if self._open != source:
            head = b"\n" if self._open is not None and name else b""
            head += f"{name} | ".encode() if name else b""
            head += f"{stamp} ".encode() if self._args.timestamps else b""
        self._open = None if is_whole else source
        shown = for_terminal(text) if out.isatty() else text
        out.buffer.write(head + shown + (b"\n" if is_whole else b""))
        out.flush()

    def _show_json(self, name: str, stamp: str, stream: str, is_whole: bool, text: bytes) -> None:
        shown: dict[str, Any] = {"instance": name} if name else {}
        shown |= {"at": stamp, "stream": stream, "text": _text(text), "whole": is_whole}
        print(json.dumps(shown), flush=True)


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def for_terminal(data: bytes) -> bytes:
    """With escapes for all but text and tabs: nothing in it moves the cursor."""
    return "\t".join(map(printable, _text(data).split("\t"))).encode()
