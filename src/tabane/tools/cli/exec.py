"""`tabane exec`: a command inside an instance, with its streams here, or with this terminal.

What it writes is its user's, and passed on as it is. With --json it is escaped.
"""

from __future__ import annotations

import argparse
import os
import re
import selectors
import sys
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from tabane.api import frames
from tabane.errors import TimedOut, UsageError
from tabane.tools import terminal
from tabane.tools.cli.asking import add_filters
from tabane.tools.cli.common import (
    CONTAINER_HELP,
    Parser,
    complain,
    print_json,
    seconds_upto,
)
from tabane.tools.cli.finding import find_in, nearness, place_of
from tabane.tools.client import Cluster
from tabane.tools.talk import BLOCK_BYTES, Talk, open_talk

USER_HELP = "NAME[:GROUP] or UID[:GID] of the image; else as the program itself"
INSTANCE_HELP = "an instance id, or an app's name: the nearest of its instances that is ready"
LONGEST_EXEC_S = 3600.0
TOOK_TOO_LONG = 124
"""The exit code, as of timeout(1)."""
VARIABLE = re.compile(r"[^=\0]+")

Show = Callable[[bytes], None]


def execute(argv: list[str]) -> int:
    args = _parse(argv)
    if args.tty and not _is_terminal(sys.stdin):
        raise UsageError("exec: -t needs a terminal, and stdin is none: leave -t away")
    cluster = Cluster(args.root)
    found = choose(cluster, args, args.instance)
    path = f"/api/v1/instances/{found['id']}/exec"
    talk = open_talk(cluster, path, _describe(args), found["node"])
    try:
        return _converse(args, talk)
    except TimedOut as error:
        if args.timeout is None:
            raise
        complain(f"exec: {error.message}")
        return TOOK_TOO_LONG


def choose(cluster: Cluster, args: argparse.Namespace, what: str) -> dict[str, Any]:
    """The instance to talk with; of an app with several in the place that is meant, `nearness` says
    which. That is told to people, and to those who want to know. Raises `NotFound`."""
    candidates = find_in(cluster, what, place_of(args))
    here = cluster.candidates()[0]
    chosen = min(candidates, key=lambda instance: nearness(instance, here))
    if args.verbose or (len(candidates) > 1 and _is_terminal(sys.stderr)):
        complain(f"{what}: instance {chosen['id']} on {chosen['node']}")
    return chosen


def add_choice(parser: Parser) -> None:
    """Which of an app's instances is meant, which container of it, and whether to say so."""
    add_filters(parser, app=False, user=False)
    parser.add_argument("-c", "--container", default="", metavar="NAME", help=CONTAINER_HELP)
    parser.add_argument("-v", "--verbose", action="store_true", help="say which instance it is")


def _converse(args: argparse.Namespace, talk: Talk) -> int:
    stdin = _stdin() if args.interactive else None
    with ExitStack() as last:
        last.callback(talk.close)
        if args.json:
            return _gather(talk, stdin)
        if not args.tty:
            return converse(talk, stdin, _to(sys.stdout), _to(sys.stderr))
        changed = last.enter_context(terminal.resizes())
        if stdin is not None:
            last.enter_context(terminal.raw(stdin))
        return converse(talk, stdin, _to(sys.stdout), _to(sys.stderr), changed)


exec = execute
"""As the table of commands has it."""


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = Parser("exec", "Run a command inside an instance, and end as it ends.")
    parser.usage = "tabane exec [options] INSTANCE [--] COMMAND ..."
    for short, name, about in (
        ("-i", "--interactive", "give it this command's input"),
        ("-t", "--tty", "give it a terminal: with -i, this one"),
    ):
        parser.add_argument(short, name, action="store_true", help=about)
    parser.add_argument("-e", "--env", type=_variable, action="append", metavar="NAME[=VALUE]")
    parser.add_argument("-u", "--user", default="", metavar="USER", help=USER_HELP)
    parser.add_argument("-w", "--workdir", default="", metavar="DIR", help="else the program's own")
    limit = seconds_upto(LONGEST_EXEC_S)
    parser.add_argument("--timeout", type=limit, metavar="SECONDS", help="then it is killed")
    add_choice(parser)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("instance", help=INSTANCE_HELP)
    parser.add_argument("command", nargs=argparse.REMAINDER, help="all that follows the instance")
    args = parser.parse_args(argv)
    if args.command[:1] == ["--"]:
        args.command.pop(0)
    if not args.command:
        raise UsageError("exec: name the command, after the instance")
    if args.command[0].startswith("-"):
        option = args.command[0]
        raise UsageError(f"exec: {option!r} is no command: options go before the instance")
    if args.json and args.tty:
        raise UsageError("exec: --json and -t do not fit: a terminal's output is not gathered")
    return args


def _describe(args: argparse.Namespace) -> dict[str, Any]:
    """What the node is told; only what differs from a plain command."""
    body: dict[str, Any] = {"argv": args.command, "stdin": args.interactive}
    env = dict(args.env or ())
    if args.tty:
        rows, columns = terminal.size_of(sys.stdin.fileno())
        body["terminal"] = {"rows": rows, "columns": columns}
        if "TERM" in os.environ:
            env = {"TERM": os.environ["TERM"]} | env
    told = {"user": args.user, "workdir": args.workdir, "env": env, "timeout_s": args.timeout}
    told["container"] = args.container
    return body | {name: value for name, value in told.items() if value}


def _is_terminal(stream: Any) -> bool:
    return stream is not None and not stream.closed and stream.isatty()


def _stdin() -> int:
    """What the command shall read: nothing when there is none."""
    try:
        return sys.stdin.fileno()
    except (AttributeError, OSError, ValueError):
        return os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)


def _to(stream: Any) -> Show:
    def show(data: bytes) -> None:
        stream.buffer.write(data)
        stream.flush()

    return show


def _gather(talk: Talk, stdin: int | None) -> int:
    out, err = bytearray(), bytearray()
    code = converse(talk, stdin, out.extend, err.extend)
    shown = {name: bytes(said).decode(errors="backslashreplace") for name, said in
             (("stdout", out), ("stderr", err))}  # fmt: skip
    print_json({"code": code, **shown})
    return code


def converse(
    talk: Talk, stdin: int | None, out: Show, err: Show, resized: int | None = None
) -> int:
    """Pass on what `stdin` gives, and what is heard, until the end; returns the exit code."""
    with selectors.PollSelector() as selector:  # it takes files, too
        selector.register(talk, selectors.EVENT_READ)
        if resized is not None:
            selector.register(resized, selectors.EVENT_READ)
        if stdin is not None:
            selector.register(stdin, selectors.EVENT_READ)
        while True:
            for key, _ in selector.select():
                if key.fileobj is talk:
                    if (code := _hear(talk, out, err)) is not None:
                        return code
                elif key.fileobj == resized:
                    os.read(key.fd, BLOCK_BYTES)
                    talk.say(frames.encode_size(*terminal.size_of(sys.stdin.fileno())))
                elif not _give(talk, key.fd):
                    selector.unregister(key.fd)
                    stdin = None
            if stdin is not None:
                _mind_credit(selector, talk, stdin)


def _hear(talk: Talk, out: Show, err: Show) -> int | None:
    for kind, data in talk.hear():
        if kind == frames.OUTPUT:
            out(data)
        elif kind == frames.ERROR:
            err(data)
        elif kind == frames.EXIT:
            return frames.parse_number(data)
    return None


def _give(talk: Talk, stdin: int) -> bool:
    """Whether there may be more of it."""
    try:
        data = os.read(stdin, min(BLOCK_BYTES, talk.credit))
    except BlockingIOError:
        return True
    except OSError:
        data = b""  # its terminal is gone
    talk.give(data)
    return bool(data)


def _mind_credit(selector: selectors.BaseSelector, talk: Talk, stdin: int) -> None:
    """Read input only when the node takes some."""
    is_read = stdin in {key.fd for key in selector.get_map().values()}
    if is_read and not talk.credit:
        selector.unregister(stdin)
    elif talk.credit and not is_read:
        selector.register(stdin, selectors.EVENT_READ)


def _variable(text: str) -> tuple[str, str]:
    """`NAME=VALUE`, or `NAME` for the value that it has here."""
    name, given, value = text.partition("=")
    if not VARIABLE.fullmatch(name) or (not given and name not in os.environ):
        problem = f"{text!r} is neither NAME=VALUE nor the name of a variable that is set here"
        raise argparse.ArgumentTypeError(problem)
    return name, value if given else os.environ[name]
