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
from typing import TYPE_CHECKING, Any

from tabane.clock import SYSTEM
from tabane.node.logfile import parse_line
from tabane.tools.cli.common import (
    CONTAINER_HELP,
    Parser,
    app_key,
    printable,
    say_silent,
    whole,
)
from tabane.tools.cli.finding import find, look_for
from tabane.tools.client import Cluster

if TYPE_CHECKING:
    from tabane.tools.cli.following import Line


def logs(argv: list[str]) -> int:
    args = _parse(argv)
    cluster = Cluster(args.root)
    show = _Show(args)
    if args.follow:
        return _follow(cluster, args, show)
    found, silent = look_for(cluster, args.what, ended=True)
    show.names = len(found) > 1
    with ExitStack() as streams:
        opened = []
        for instance in found:
            path = f"/api/v1/instances/{instance['id']}/log?{_query(args)}"
            stream = cluster.stream(path, node=instance["node"], or_any=True)
            opened.append(_named(instance["id"], streams.enter_context(stream)))
        for line in heapq.merge(*opened, key=lambda line: line[1].partition(b" ")[0]):
            show(line)
    return say_silent(silent)


def _follow(cluster: Cluster, args: argparse.Namespace, show: _Show) -> int:
    from tabane.tools.cli.following import Following, is_deployed

    if args.since is not None:
        from tabane.node.logtail import parse_since

        parse_since(args.since, SYSTEM.wall())  # refused before anything is there to be read
    app, tail = app_key(args.what), args.tail or 0
    of_app = show.names = is_deployed(cluster, app)
    followed = app if of_app else ""
    container = _quoted(args.container)
    following = Following(cluster, show, followed, tail, _quoted(args.since), container)
    if not of_app:
        for instance in find(cluster, args.what, ended=True):
            following.read(instance["id"], instance["node"], tail=tail)
    return following.run()


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("logs", "What an instance wrote; also after its end, by its id.")
    parser.add_argument("what", help="an instance id, or an app's name")
    parser.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="go on: an instance's to its end, an app's also with those that start later",
    )
    parser.add_argument("-n", "--tail", type=whole(1), metavar="N", help="the last N lines")
    about = "only what is no older than 10m, 2h, ..., or than a moment as 2026-01-31T09:00:00Z"
    parser.add_argument("--since", metavar="WHEN", help=about)
    parser.add_argument("-c", "--container", default="", metavar="NAME", help=CONTAINER_HELP)
    parser.add_argument("-t", "--timestamps", action="store_true")
    parser.add_argument("--json", action="store_true", help="one object a line")
    return parser.parse_args(argv)


def _query(args: argparse.Namespace) -> str:
    since = f"&since={_quoted(args.since)}" if args.since is not None else ""
    container = f"&container={_quoted(args.container)}" if args.container else ""
    return f"tail={args.tail or 0}&follow=false{since}{container}"


def _quoted(text: str | None) -> str:
    if not text:
        return ""
    from urllib.parse import quote

    return quote(text, safe="")


def _named(name: str, lines: Iterator[bytes]) -> Iterator[Line]:
    for line in lines:
        yield name, line


class _Show:
    """Prints lines; with the name of each one's instance in front if it `names` them."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.names = False
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
            head = b"\n" if self._open is not None and self.names else b""
            head += f"{name} | ".encode() if self.names else b""
            head += f"{stamp} ".encode() if self._args.timestamps else b""
        self._open = None if is_whole else source
        shown = for_terminal(text) if out.isatty() else text
        out.buffer.write(head + shown + (b"\n" if is_whole else b""))
        out.flush()

    def _show_json(self, name: str, stamp: str, stream: str, is_whole: bool, text: bytes) -> None:
        line: dict[str, Any] = {"instance": name, "at": stamp, "stream": stream}
        shown = line | {"text": _text(text), "whole": is_whole}
        print(json.dumps(shown), flush=True)


def _text(data: bytes) -> str:
    return data.decode(errors="backslashreplace")


def for_terminal(data: bytes) -> bytes:
    """With escapes for all but text and tabs: nothing in it moves the cursor."""
    return "\t".join(map(printable, _text(data).split("\t"))).encode()
