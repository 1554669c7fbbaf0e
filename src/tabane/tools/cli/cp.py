"""`tabane cp`: files into an instance or out of it, as a tar stream that is made and taken apart
as it goes. `INSTANCE:PATH` is there, all else here; `-` is such a stream itself.

What comes out of an instance is not trusted: see `tabane.runtimes.archive`.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import IO, Any

from tabane.api import frames
from tabane.errors import NotFound, UsageError
from tabane.tools.cli.common import Parser, complain, print_json
from tabane.tools.cli.exec import USER_HELP, add_choice, choose
from tabane.tools.cli.finding import find_only, place_of
from tabane.tools.client import Cluster
from tabane.tools.talk import BLOCK_BYTES, Talk, open_talk

REMOTE = re.compile(r"([a-z0-9][a-z0-9/-]*):(.*)", re.DOTALL)
"""A name of this machine's that looks like that is written ./NAME."""
STREAM = "-"


def cp(argv: list[str]) -> int:
    args = _parse(argv)
    source, target = REMOTE.fullmatch(args.source), REMOTE.fullmatch(args.target)
    remote = source or target
    if remote is None or (source and target):
        raise UsageError("cp: one of the two is INSTANCE:PATH, the other is a path here, or -")
    if STREAM in (args.source, args.target):
        _check_stream(args)
    copy = _copy_out if source else _copy_in
    code, passed = copy(args, remote[1], remote[2])
    if args.json:
        print_json({"code": code, "from": args.source, "to": args.target, "stream_bytes": passed})
    return code


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("cp", "Copy files and directories into an instance, or out of it.")
    parser.add_argument("-u", "--user", default="", metavar="USER", help=USER_HELP)
    every = (
        "accepted: directories are copied with all in them, and modes and times are kept, always"
    )
    parser.add_argument("-r", "-R", "-a", "-p", dest="ignored", action="store_true", help=every)
    add_choice(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("source", help="INSTANCE:PATH or a path here; -: a tar stream from stdin")
    parser.add_argument("target", help="the other; -: a tar stream to stdout")
    return parser.parse_args(argv)


def _check_stream(args: argparse.Namespace) -> None:
    if args.source == STREAM:
        if sys.stdin is None or sys.stdin.isatty():
            raise UsageError("cp: - is a tar stream from stdin, and there is none")
    elif sys.stdout.isatty():
        raise UsageError("cp: a tar stream is nothing for a terminal: write it to a file")
    elif args.json:
        raise UsageError("cp: stdout is the tar stream's, so it cannot be --json's")


def _open(
    args: argparse.Namespace, instance: str, path: str, *, inward: bool, **more: object
) -> Talk:
    """Out of any instance of an app; but into none that was not named."""
    cluster = Cluster(args.root)
    if inward:
        found = find_only(cluster, instance, place_of(args))
    else:
        found = choose(cluster, args, instance)
    what = {"path": path if path.startswith("/") else f"/{path}", "inward": inward, **more}
    told = {"user": args.user, "container": args.container}
    what |= {name: value for name, value in told.items() if value}
    return open_talk(cluster, f"/api/v1/instances/{found['id']}/copy", what, found["node"])


# Out


def _copy_out(args: argparse.Namespace, instance: str, path: str) -> tuple[int, int]:
    """The exit code, and how many bytes came."""
    if args.target == STREAM:
        with closing(_open(args, instance, path, inward=False)) as talk:
            code = _hear_all(talk, lambda data: _write_all(sys.stdout.fileno(), data))
            return code, talk.passed
    directory, name = _place(args.target)
    try:
        with closing(_open(args, instance, path, inward=False)) as talk:
            return _unpack(talk, directory, name), talk.passed
    finally:
        os.close(directory)


def _place(target: str) -> tuple[int, str | None]:
    """The directory to unpack into, open; and the name that what comes is to have there."""
    path, name = Path(target), None
    if not path.is_dir():
        if target.endswith("/"):
            raise NotFound(f"cp: there is no directory {target}")
        path = path.resolve() if path.is_symlink() else path
        path, name = path.parent, path.name
    try:
        return os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC), name
    except OSError as error:
        raise NotFound(f"cp: {path}: {error.strerror}") from None


def _unpack(talk: Talk, directory: int, name: str | None) -> int:
    from tabane.runtimes.archive import unpack

    stream = _Incoming(talk)
    try:
        unpack(stream, directory, name=name)
    except UsageError:
        if not stream.code:
            raise  # else the other side said why nothing more came
    return stream.end()


class _Incoming:
    """What is heard, as a file to be read."""

    def __init__(self, talk: Talk) -> None:
        self.code: int | None = None
        self._talk = talk
        self._waiting = bytearray()

    def read(self, most: int) -> bytes:
        while len(self._waiting) < most and self.code is None:
            self._listen()
        data = bytes(self._waiting[:most])
        del self._waiting[:most]
        return data

    def end(self) -> int:
        """Hear the rest, which follows an archive's end; the exit code."""
        while self.code is None:
            self._listen()
            self._waiting.clear()
        return self.code

    def _listen(self) -> None:
        code = _take(self._talk, self._waiting.extend)
        self.code = self.code if code is None else code


# In


def _copy_in(args: argparse.Namespace, instance: str, path: str) -> tuple[int, int]:
    """The exit code, and how many bytes went."""
    if args.source == STREAM:
        with closing(_open(args, instance, path, inward=True)) as talk:
            return _send_stream(talk, sys.stdin.buffer), talk.passed
    if not os.path.lexists(args.source):
        raise NotFound(f"cp: there is no {args.source}")
    with closing(_open(args, instance, path, inward=True, as_named=True)) as talk:
        return _send_files(talk, args.source), talk.passed


class _Ended(Exception):
    """The other side takes no more."""


def _send_stream(talk: Talk, stream: IO[bytes]) -> int:
    out = _Outgoing(talk)
    try:
        while block := stream.read(BLOCK_BYTES):
            out.write(block)
    except _Ended:
        return out.code or 0
    return out.end()


def _send_files(talk: Talk, source: str) -> int:
    from tabane.runtimes.archive import pack

    out, code = _Outgoing(talk), 0

    def note(text: str) -> None:
        nonlocal code
        code = 1
        complain(f"cp: {text}")

    try:
        pack(source, out.write, note)
    except _Ended:
        return out.code or 0
    return out.end() or code


class _Outgoing:
    """Gives what is written, as much as the other side takes."""

    def __init__(self, talk: Talk) -> None:
        self.code: int | None = None
        self._talk = talk

    def write(self, data: bytes) -> None:
        view = memoryview(data)
        while view:
            while not self._talk.credit:
                self._listen()
            block = view[: min(BLOCK_BYTES, self._talk.credit)]
            self._talk.give(bytes(block))
            view = view[len(block) :]

    def end(self) -> int:
        self._talk.give(b"")
        while self.code is None:
            self.code = _take(self._talk, _drop)
        return self.code

    def _listen(self) -> None:
        self.code = _take(self._talk, _drop)
        if self.code is not None:
            raise _Ended


# What is heard


def _hear_all(talk: Talk, out: Callable[[bytes], Any]) -> int:
    while (code := _take(talk, out)) is None:
        pass
    return code


def _take(talk: Talk, out: Callable[[bytes], Any]) -> int | None:
    """What comes next; the exit code, once that does."""
    for kind, data in talk.hear():
        if kind == frames.OUTPUT:
            out(data)
        elif kind == frames.ERROR:
            for line in data.decode(errors="backslashreplace").splitlines():
                complain(f"cp: {line}")
        elif kind == frames.EXIT:
            return frames.parse_number(data)
    return None


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


def _drop(data: bytes) -> None: ...
