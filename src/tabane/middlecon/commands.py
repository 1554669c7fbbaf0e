"""The commands of `middlecon`, but `bench`: each takes its options and returns the exit code."""

from __future__ import annotations

import argparse
import asyncio
import os
import secrets
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from datetime import datetime
from typing import Any

import msgspec

from tabane.clock import SYSTEM
from tabane.errors import NotFound, TabaneError, UsageError
from tabane.middlecon.client import Client, Room, connect
from tabane.middlecon.frames import DATA_BYTES
from tabane.middlecon.hub import Hub
from tabane.middlecon.inbox import Message
from tabane.middlecon.receipts import Receipt
from tabane.middlecon.screen import (
    HubStats,
    View,
    as_json,
    fit,
    look,
    one_line,
    printable,
    receipt_json,
    receipt_lines,
    state_json,
    state_lines,
    view_json,
    view_lines,
)
from tabane.middlecon.script_member import ScriptMember, enter

DEFAULT_URL = "tcp://127.0.0.1:8080"
CONNECT_TIMEOUT_S = 1.0
MAX_FOLLOWED = 100
"""Rooms that `top` follows when it is not told which."""
BROKEN_PIPE = 128 + signal.SIGPIPE
HOME, CLEAR_LINE, CLEAR_BELOW = "\x1b[H", "\x1b[K", "\x1b[J"
HIDE_CURSOR, SHOW_CURSOR = "\x1b[?25l", "\x1b[?25h"


def stop_on_signals() -> asyncio.Event:
    """Set by Ctrl-C and SIGTERM, which then do nothing else."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stopped.set)
    return stopped


def dial(options: argparse.Namespace, name: str | None = None) -> Any:
    """An awaitable client. Raises as `connect` does."""
    name = name or getattr(options, "name", None)
    return connect(options.hub, name=name, token=options.token, timeout_s=CONNECT_TIMEOUT_S)


async def serve(options: argparse.Namespace) -> int:
    listen = options.listen or [DEFAULT_URL]
    async with Hub(options.name, listen=listen, token=options.token, chat=options.chat) as hub:
        for address in hub.addresses:
            print(f"Listening on: {address}", flush=True)
        for peer, url in options.link:
            hub.link(peer, url, options.token)
        await stop_on_signals().wait()
    return 0


async def join(options: argparse.Namespace) -> int:
    async with await dial(options) as me:
        stop = stop_on_signals()
        member = ScriptMember(options, stop)
        await enter(me, options, member)
        await stop.wait()
    return BROKEN_PIPE if member.broken else 0


# Messages


def read_text(text: str) -> bytes:
    """The TEXT of the command line, or standard input for `-`. Raises `UsageError`.

    Not on an event loop, where Ctrl-C would not end the reading.
    """
    if text != "-":
        return os.fsencode(text)
    if sys.stdin is None:
        raise UsageError("'-' stands for standard input, and there is none")
    data: bytes = sys.stdin.buffer.read(DATA_BYTES + 1)
    if len(data) > DATA_BYTES:
        raise UsageError(f"standard input has more than {DATA_BYTES} bytes, the most of a message")
    return data


async def say(options: argparse.Namespace) -> int:
    async with await dial(options) as me:
        room = await me.join(options.room, member=False, watch=False)
        receipt = await room.say(options.data, timeout_s=options.timeout)
    return report(options, receipt)


async def ask(options: argparse.Namespace) -> int:
    async with await dial(options) as me:
        room = await me.join(options.room, member=False, watch=False)
        replies = await room.ask(options.data, timeout_s=options.timeout)
    if not options.json:
        for member, answer in sorted(replies.answers.items()):
            print(f"{one_line(member)}: {printable(answer)}")
    return report(options, replies, file=sys.stderr)


async def cast(options: argparse.Namespace) -> int:
    async with await dial(options) as me:
        room = await me.join(options.room, member=False, watch=False)
        await room.cast(options.data)
    return 0


def report(options: argparse.Namespace, receipt: Receipt, file: Any = None) -> int:
    if options.json:
        print(as_json(receipt_json(receipt)))
    else:
        print("\n".join(receipt_lines(receipt)), file=file)
    return 0 if receipt.complete else 1


# What members publish


async def state(options: argparse.Namespace) -> int:
    async with await dial(options) as me:
        room = await me.join(options.room, member=False)
        seen = {name: dict(values) for name, values in room.state.items()}
    if options.member is not None:
        if options.member not in seen:
            raise NotFound(f"there is no member {options.member} in the room {options.room}")
        seen = {options.member: seen[options.member]}
    if options.json:
        print(as_json(state_json(seen)))
    elif seen:
        print("".join(f"{line}\n" for line in state_lines(seen)), end="")
    return 0


# top


async def top(options: argparse.Namespace) -> int:
    screen = sys.stdout.isatty() and not (options.batch or options.json)
    async with await dial(options, f"top-{secrets.token_hex(4)}") as me:
        watcher = Watcher(me, member=options.join)
        stop = stop_on_signals()
        show = _show_screen if screen else _show_json if options.json else _show_batch
        if screen:
            print(HIDE_CURSOR + HOME + CLEAR_BELOW, end="", flush=True)
        try:
            await _refresh(options, watcher, stop, show)
        finally:
            if screen:
                print(SHOW_CURSOR, end="", flush=True)
    return 0


Show = Callable[[View, View | None], None]


async def _refresh(
    options: argparse.Namespace, watcher: Watcher, stop: asyncio.Event, show: Show
) -> None:
    before: View | None = None
    shown = 0
    while not stop.is_set():
        view = await watcher.look(options.rooms)
        show(view, before)
        before, shown = view, shown + 1
        if shown == options.iterations:
            return
        try:
            async with asyncio.timeout(options.delay):
                await stop.wait()
        except TimeoutError:
            pass


def _clock() -> str:
    return datetime.fromtimestamp(SYSTEM.wall()).strftime("%H:%M:%S")


def _show_screen(view: View, before: View | None) -> None:
    size = shutil.get_terminal_size()
    lines = fit(view_lines(view, before, _clock()), size.columns, size.lines - 1)
    print(
        HOME + "".join(f"{line}{CLEAR_LINE}\n" for line in lines) + CLEAR_BELOW, end="", flush=True
    )


def _show_batch(view: View, before: View | None) -> None:
    print("\n".join(view_lines(view, before, _clock())), end="\n\n", flush=True)


def _show_json(view: View, before: View | None) -> None:
    print(as_json(view_json(view, before)), flush=True)


class Watcher:
    """Follows rooms: those that were named, or the first of those that the hub's statistics name.

    As a `member` of them it counts what is said there, and acknowledges it.
    """

    def __init__(self, client: Client, *, member: bool) -> None:
        self._client = client
        self._member = member
        self._rooms: dict[str, Room] = {}
        self._heard: dict[str, Counter[str]] = {}

    async def look(self, names: Iterable[str]) -> View:
        stats = await self._stats()
        names = set(names) or set(sorted(stats.rooms if stats else ())[:MAX_FOLLOWED])
        if self._client.connected:
            for name in names - self._rooms.keys():
                await self._follow(name)
            for name in self._rooms.keys() - names:
                self._rooms.pop(name).leave()
                self._heard.pop(name, None)
        return look(self._client, self._rooms.values(), self._heard, stats, SYSTEM.now())

    async def _follow(self, name: str) -> None:
        room = await self._client.join(name, member=False)
        if self._member:
            heard: Counter[str] = Counter()

            def count(message: Message) -> None:
                heard[message.sender] += 1

            room.on_message(count)
            self._heard[name] = heard
            await self._client.join(name)
        self._rooms[name] = room

    async def _stats(self) -> HubStats | None:
        """None: the hub has none that we understand, or there is no session now."""
        query = getattr(self._client, "hub_stats", None)
        if query is None or not self._client.connected:
            return None
        try:
            return msgspec.convert(await query(), HubStats)
        except (TabaneError, msgspec.ValidationError):
            return None
