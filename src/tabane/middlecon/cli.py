"""The command `middlecon`: a hub that stands alone, and a member on the command line.

    middlecon [ADDR:PORT]          serve there, 127.0.0.1:8080 unless told
    middlecon serve --listen URL ...
    middlecon join ROOM            print what is said there
    middlecon say ROOM TEXT        tell all members, and show who got it
    middlecon ask ROOM TEXT        show what they answer

Exit codes: 0 done and every member acknowledged, 1 not so, 2 the command line is wrong.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import signal
import sys
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any, NoReturn

from tabane.errors import TabaneError, UsageError
from tabane.middlecon.addresses import parse_host_port, parse_url
from tabane.middlecon.client import Client, connect
from tabane.middlecon.frames import check_name
from tabane.middlecon.hub import Hub
from tabane.middlecon.inbox import Message
from tabane.middlecon.receipts import Receipt
from tabane.security.identity import read_token

DEFAULT_URL = "tcp://127.0.0.1:8080"
CONNECT_TIMEOUT_S = 1.0
COMMANDS = ("serve", "join", "say", "ask")


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv`; return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        options = _parse(arguments)
        options.token = read_token(options.token_file) if options.token_file else None
        return _run(options.action(options))
    except UsageError as error:
        return _fail(error.message, 2)
    except TabaneError as error:
        return _fail(error.message, 1)
    except OSError as error:
        return _fail(f"{error.filename or 'middlecon'}: {error.strerror or error}", 2)
    except KeyboardInterrupt:
        return 130


def _fail(message: str, code: int) -> int:
    print(f"middlecon: {message}", file=sys.stderr)
    return code


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
    for url in [*getattr(options, "listen", []), getattr(options, "hub", DEFAULT_URL)]:
        parse_url(url)
    if (timeout_s := getattr(options, "timeout", 1.0)) <= 0:
        raise UsageError(f"argument --timeout: {timeout_s:g} seconds are no time to wait")
    for name in (getattr(options, "room", None), options.name):
        if name is not None:
            with _as_usage():
                check_name(name)
    return options


@contextlib.contextmanager
def _as_usage() -> Any:
    try:
        yield
    except TabaneError as error:
        raise UsageError(error.message) from None


def _make_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="middlecon", description="Messages to many processes, with receipts.")
    commands = parser.add_subparsers(required=True, parser_class=_Parser, metavar="COMMAND")

    serve = commands.add_parser("serve", help="run a hub")
    serve.add_argument("--listen", metavar="URL", action="append", default=[])
    serve.add_argument("--name", default="hub", help="the hub's name")
    serve.add_argument("--token-file", type=Path, help="dialers on TCP must have this token")
    serve.set_defaults(action=_serve)

    member = _Parser(add_help=False)
    member.add_argument("room")
    member.add_argument("--hub", metavar="URL", default=DEFAULT_URL)
    member.add_argument("--name", help="the name to join under")
    member.add_argument("--token-file", type=Path)

    join = commands.add_parser("join", help="print what is said in a room", parents=[member])
    join.set_defaults(action=_join)
    for name, action, text in (("say", _say, "tell"), ("ask", _ask, "ask")):
        command = commands.add_parser(name, help=f"{text} all members", parents=[member])
        command.add_argument("text")
        command.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS")
        command.set_defaults(action=action)
    return parser


def _run(work: Coroutine[Any, Any, int]) -> int:
    import uvloop

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(work)


async def _serve(options: argparse.Namespace) -> int:
    listen = options.listen or [DEFAULT_URL]
    async with Hub(options.name, listen=listen, token=options.token) as hub:
        for address in hub.addresses:
            print(f"Listening on: {address}", flush=True)
        await _until_stopped()
    return 0


async def _until_stopped() -> None:
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    await stopped.wait()


async def _connect(options: argparse.Namespace) -> Client:
    return await connect(
        options.hub, name=options.name, token=options.token, timeout_s=CONNECT_TIMEOUT_S
    )


async def _join(options: argparse.Namespace) -> int:
    async with await _connect(options) as me:
        room = await me.join(options.room, watch=False)

        @room.on_message
        def print_message(message: Message) -> None:
            print(f"{message.sender}: {message.data.decode(errors='replace')}", flush=True)

        print(f"{me.name} is in {room.name}", file=sys.stderr, flush=True)
        await _until_stopped()
    return 0


async def _say(options: argparse.Namespace) -> int:
    async with await _connect(options) as me:
        room = await me.join(options.room, member=False, watch=False)
        receipt = await room.say(options.text.encode(), timeout_s=options.timeout)
    return _report(receipt)


async def _ask(options: argparse.Namespace) -> int:
    async with await _connect(options) as me:
        room = await me.join(options.room, member=False, watch=False)
        replies = await room.ask(options.text.encode(), timeout_s=options.timeout)
    for member, answer in sorted(replies.answers.items()):
        print(f"{member}: {answer.decode(errors='replace')}")
    return _report(replies, file=sys.stderr)


def _report(receipt: Receipt, file: Any = None) -> int:
    """How many got it, and a line for each who did not."""
    missed = {name: str(reason) for name, reason in receipt.failed.items()}
    missed |= dict.fromkeys(receipt.unknown, "unknown: the link to its hub died")
    missed |= dict.fromkeys(receipt.asleep, "asleep")
    count = len(receipt.acknowledged)
    print(f"{count} of {count + len(missed)} acknowledged", file=file)
    for name, why in sorted(missed.items()):
        print(f"  {name}: {why}", file=file)
    return 0 if receipt.complete else 1
