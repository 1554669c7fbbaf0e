"""The command `middlecon`: a hub that stands alone, and a member on the command line.

    middlecon [ADDR:PORT]          serve there, 127.0.0.1:8080 unless told
    middlecon serve --listen URL ...
    middlecon join ROOM            print what is said there; may answer, and publish
    middlecon say ROOM TEXT        tell all members, and show who got it
    middlecon ask ROOM TEXT        show what they answer
    middlecon cast ROOM TEXT       tell all members, and wait for nobody
    middlecon state ROOM           show what its members publish
    middlecon top [ROOM ...]       follow members, state, hubs and links
    middlecon bench                measure a running hub

TEXT is `-` for standard input. Exit codes: 0 done and every member acknowledged, 1 not so, 2 the
command line is wrong; 130 interrupted, 141 nobody reads the output any more.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import sys
from collections.abc import Callable, Coroutine, Iterator, Sequence
from pathlib import Path
from typing import Any

from tabane.commandline import CommandLine
from tabane.errors import TabaneError, UsageError
from tabane.middlecon import commands
from tabane.middlecon.addresses import parse_host_port, parse_url
from tabane.middlecon.frames import DATA_BYTES, check_name
from tabane.security.identity import read_token
from tabane.units import parse_seconds

COMMANDS = ("serve", "join", "say", "ask", "cast", "state", "top", "bench")
HUB_VARIABLE = "TABANE_HUB"
"""Where the hub is, for who does not say; containers that may use one have it set."""
MAX_SECONDS = 3600.0
"""The longest timeout a hub keeps."""
MAX_BENCH_MEMBERS = 9_000
"""Below the sessions a hub takes unless told."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parse(arguments)
        if "text" in options:
            options.data = commands.read_text(options.text)
        code = _run(options.action(options))
        sys.stdout.flush()
    except TabaneError as error:
        return _fail(error.message, 2 if type(error) is UsageError else 1)
    except BrokenPipeError:
        code = commands.BROKEN_PIPE
    except OSError as error:
        return _fail(f"{error.filename or 'output'}: {error.strerror or error}", 1)
    except KeyboardInterrupt:
        return 130
    if code == commands.BROKEN_PIPE:
        _drop_output()
    return code


def _fail(message: str, code: int) -> int:
    with contextlib.suppress(OSError):
        print(f"middlecon: {message}", file=sys.stderr)
    return code


def _drop_output() -> None:
    """What is still buffered goes nowhere, instead of failing once more at the very end."""
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, sys.stdout.fileno())
    os.close(nothing)


def _run(work: Coroutine[Any, Any, int]) -> int:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


# The command line


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Raises `UsageError`."""
    if not arguments:
        arguments = ["serve"]
    elif arguments[0] not in COMMANDS and not arguments[0].startswith("-"):
        if ":" not in arguments[0]:
            known = ", ".join(COMMANDS)
            raise UsageError(f"there is no command {arguments[0]!r}, only {known} (or ADDR:PORT)")
        parse_host_port(arguments[0])
        arguments = ["serve", "--listen", f"tcp://{arguments[0]}", *arguments[1:]]
    options = _make_parser().parse_args(arguments)
    for url in [*getattr(options, "listen", []), getattr(options, "hub", commands.DEFAULT_URL)]:
        parse_url(url)
    single = (getattr(options, name, None) for name in ("room", "name", "member"))
    with _as_usage():
        for name in (*single, *getattr(options, "rooms", [])):
            if name is not None:
                check_name(name)
        for key, _ in getattr(options, "put", []):
            check_name(key, "state key")
    options.token = _read_token(options.token_file)
    return options


def _read_token(file: Path | None) -> str | None:
    try:
        return None if file is None else read_token(file)
    except OSError as error:
        raise UsageError(f"{file}: {error.strerror or error}") from None


@contextlib.contextmanager
def _as_usage() -> Iterator[None]:
    try:
        yield
    except TabaneError as error:
        raise UsageError(error.message) from None


def _seconds(text: str) -> float:
    try:
        seconds = parse_seconds(text)
    except UsageError:
        problem = f"{text!r} is no number of seconds, as 2, 0.5 or 2s"
        raise argparse.ArgumentTypeError(problem) from None
    if 0 < seconds <= MAX_SECONDS:
        return seconds
    problem = f"{seconds:g} seconds are {'too long' if seconds else 'no time'} to wait"
    raise argparse.ArgumentTypeError(problem)


def _number(least: int, most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if text.isascii() and text.isdecimal() and least <= int(text) <= most:
            return int(text)
        raise argparse.ArgumentTypeError(f"{text!r} is no number from {least} to {most}")

    return parse


def _pair(text: str) -> tuple[str, bytes]:
    key, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no KEY=VALUE")
    return key, os.fsencode(value)


def _link(text: str) -> tuple[str, str]:
    name, equals, url = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is no NAME=URL")
    try:
        parse_url(url)
        return check_name(name, "hub name"), url
    except TabaneError as error:
        raise argparse.ArgumentTypeError(error.message) from None


def _make_parser() -> argparse.ArgumentParser:
    parser = CommandLine(
        "middlecon",
        description="Messages to many processes, with receipts.",
        epilog="'middlecon' alone, and 'middlecon ADDR:PORT', run a hub.",
    )
    parser.add_version("-V")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_serve(commands)
    _add_join(commands)
    _add_messages(commands)
    _add_state(commands)
    _add_top(commands)
    _add_bench(commands)
    return parser


def _client_options() -> argparse.ArgumentParser:
    client = CommandLine("middlecon", add_help=False)
    client.add_argument(
        "--hub",
        metavar="URL",
        default=os.environ.get(HUB_VARIABLE) or commands.DEFAULT_URL,
        help=f"unless told, ${HUB_VARIABLE} if that is set, else {commands.DEFAULT_URL}",
    )
    client.add_argument("--token-file", type=Path, help="the hub's token, if it wants one")
    return client


def _member_options() -> argparse.ArgumentParser:
    member = CommandLine("middlecon", add_help=False, parents=[_client_options()])
    member.add_argument("room", metavar="ROOM")
    member.add_argument("--name", help="the name of this member")
    return member


def _add_json(command: argparse.ArgumentParser, what: str = "show JSON, for scripts") -> None:
    command.add_argument("--json", action="store_true", help=what)


def _add_serve(subparsers: Any) -> None:
    serve = subparsers.add_parser("serve", help="run a hub")
    serve.add_argument(
        "--listen",
        metavar="URL",
        action="append",
        default=[],
        help=f"tcp://HOST:PORT or unix:///PATH (repeatable); unless told, {commands.DEFAULT_URL}",
    )
    serve.add_argument("--name", default="hub", help="the hub's name; unless told, 'hub'")
    serve.add_argument(
        "--link",
        type=_link,
        metavar="NAME=URL",
        action="append",
        default=[],
        help="keep a link to the hub NAME, which is there and has the same token (repeatable)",
    )
    serve.add_argument("--token-file", type=Path, help="dialers on TCP must have this token")
    serve.add_argument(
        "--chat",
        action=argparse.BooleanOptionalAction,
        help="whether people may talk in the lobby with nc; unless told, if there is no token",
    )
    serve.set_defaults(action=commands.serve)


def _add_join(subparsers: Any) -> None:
    join = subparsers.add_parser(
        "join", help="print what is said in a room", parents=[_member_options()]
    )
    join.add_argument(
        "--put",
        type=_pair,
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="publish a value while this member is there (repeatable)",
    )
    answers = join.add_mutually_exclusive_group()
    answers.add_argument("--answer", metavar="TEXT", help="reply with TEXT to those who ask")
    answers.add_argument(
        "--exec",
        metavar="COMMAND",
        help="run COMMAND by the shell for each message, which is its standard input; what it "
        "writes is the reply, and an exit code other than 0 refuses",
    )
    _add_json(join, "print each message as a line of JSON")
    join.set_defaults(action=commands.join)


def _add_messages(subparsers: Any) -> None:
    for name, action, text in (
        ("say", commands.say, "tell all members, and show who got it"),
        ("ask", commands.ask, "tell all members, and show what they answer"),
        ("cast", commands.cast, "tell all members, and wait for nobody"),
    ):
        command = subparsers.add_parser(name, help=text, parents=[_member_options()])
        command.add_argument("text", metavar="TEXT", help="'-' is standard input")
        if name != "cast":
            _add_timeout(command)
            _add_json(command)
        command.set_defaults(action=action)


def _add_timeout(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--timeout",
        type=_seconds,
        default=5.0,
        metavar="SECONDS",
        help="how long members may take; unless told, 5",
    )


def _add_state(subparsers: Any) -> None:
    state = subparsers.add_parser(
        "state", help="show what a room's members publish", parents=[_member_options()]
    )
    state.add_argument("--member", help="show the values of this one only")
    _add_json(state)
    state.set_defaults(action=commands.state)


def _add_top(subparsers: Any) -> None:
    top = subparsers.add_parser(
        "top", help="follow rooms, members and hubs", parents=[_client_options()]
    )
    top.add_argument("rooms", metavar="ROOM", nargs="*")
    top.add_argument("-b", "--batch", action="store_true", help="one view below the other")
    top.add_argument(
        "-n",
        "--iterations",
        type=_number(1, 1 << 31),
        metavar="N",
        help="end after so many views",
    )
    top.add_argument("-d", "--delay", type=_seconds, default=1.0, metavar="SECONDS")
    top.add_argument(
        "--join",
        action="store_true",
        help="be a member of the rooms, to count messages by their senders",
    )
    _add_json(top, "show each view as a line of JSON")
    top.set_defaults(action=commands.top)


def _add_bench(subparsers: Any) -> None:
    bench = subparsers.add_parser(
        "bench", help="measure a running hub", parents=[_client_options()]
    )
    bench.add_argument("--members", type=_number(1, MAX_BENCH_MEMBERS), default=10, metavar="N")
    bench.add_argument("--size", type=_number(0, DATA_BYTES), default=64, metavar="BYTES")
    bench.add_argument(
        "--duration", type=_seconds, default=1.0, metavar="SECONDS", help="of each of four jobs"
    )
    _add_timeout(bench)
    _add_json(bench)
    bench.set_defaults(action=_bench)


def _bench(options: argparse.Namespace) -> Coroutine[Any, Any, int]:
    from tabane.middlecon.measure import bench

    return bench(options)
