"""`middlecon join`: a member that is a script. It prints what is said, and may answer."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import signal
import sys
from asyncio.subprocess import Process

from tabane.errors import Refused, TimedOut, UsageError
from tabane.middlecon.client import Client, Room
from tabane.middlecon.frames import DATA_BYTES
from tabane.middlecon.inbox import Message
from tabane.middlecon.screen import as_json, json_data, one_line, printable
from tabane.supervise import Supervisor

MAX_PROCESSES = 16
"""Commands of one `join --exec` that run at a time; more messages wait, until their deadline."""


class ScriptMember:
    """What `join` does with a message: print it, then answer as told.

    `broken` is set when nobody reads what is printed any more; then messages are refused.
    """

    def __init__(self, options: argparse.Namespace, stop: asyncio.Event) -> None:
        self.broken = False
        self._options = options
        self._stop = stop
        self._free = asyncio.Semaphore(MAX_PROCESSES)

    async def handle(self, message: Message) -> bytes | None:
        self._print(message)
        if self._options.exec is not None:
            return await self._run(message)
        return None if self._options.answer is None else os.fsencode(self._options.answer)

    def _print(self, message: Message) -> None:
        try:
            print(self._line(message), flush=True)
        except BrokenPipeError:
            self.broken = True
            self._stop.set()
            raise Refused("nobody reads what this member prints any more") from None

    def _line(self, message: Message) -> str:
        if not self._options.json:
            return f"{one_line(message.sender)}: {printable(message.data)}"
        fields = {"sender": message.sender, "room": message.room, "data": json_data(message.data)}
        return as_json(fields | {"wants_reply": message.wants_reply})

    async def _run(self, message: Message) -> bytes:
        """The message to the command's standard input; its standard output is the answer."""
        try:
            async with asyncio.timeout(message.timeout_s or None), self._free:
                status, output = await run_command(self._options.exec, message)
        except TimeoutError:
            raise TimedOut(f"the command took longer than {message.timeout_s:g} s") from None
        if status != 0:
            last_words = output.decode(errors="replace").partition("\n")[0]
            raise Refused(last_words or f"the command {describe_status(status)}")
        if len(output) > DATA_BYTES:
            raise UsageError(f"the command wrote {len(output)} bytes, more than {DATA_BYTES}")
        return output


async def run_command(command: str, message: Message) -> tuple[int, bytes]:
    """Exit status and output. Cancelled, it kills the command and what it started.

    The message is a file in memory, not a pipe, so a command need not read it.
    """
    about = {"MIDDLECON_SENDER": message.sender, "MIDDLECON_ROOM": message.room or ""}
    with os.fdopen(os.memfd_create("message"), "w+b") as given:
        given.write(message.data)
        given.seek(0)
        starting = asyncio.create_subprocess_shell(
            command,
            stdin=given,
            stdout=asyncio.subprocess.PIPE,
            env=os.environ | about,
            start_new_session=True,
        )
        async with Supervisor("member") as tasks:
            process = await tasks.begin(command, starting, _kill)
    try:
        output, _ = await process.communicate()
    finally:
        await _kill(process)
    assert process.returncode is not None
    return process.returncode, output


async def _kill(process: Process) -> None:
    """It and what it started, unless it has ended."""
    if process.returncode is None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()


def describe_status(status: int) -> str:
    return f"ended with exit code {status}" if status > 0 else f"was killed by signal {-status}"


async def enter(me: Client, options: argparse.Namespace, member: ScriptMember) -> Room:
    """Join with the handler in place: what is said right after is not refused."""
    for key, value in options.put:
        await me.state.put(key, value)
    room = await me.join(options.room, member=False, watch=False)
    room.on_message(member.handle)
    await me.join(options.room, watch=False)

    @me.on_disconnected
    def tell_of_loss() -> None:
        print(f"{me.name} lost its hub: {me.trouble}", file=sys.stderr, flush=True)

    @me.on_connected
    def tell_of_return() -> None:
        print(f"{me.name} is in {room.name} again", file=sys.stderr, flush=True)

    print(f"{me.name} is in {room.name}", file=sys.stderr, flush=True)
    return room
