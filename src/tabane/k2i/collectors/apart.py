"""A plugin's collector in a process of its own, so that nothing it does can hold up the others: it
may block, leak, or crash.

The process (`tabane.k2i.collectors.worker`) is kept from one reading to the next. It is asked with
a line, and answers with a line of JSON; at its deadline, or when it answers anything else, it is
killed, and the next reading starts a new one.
"""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from contextlib import suppress

import msgspec

from tabane.errors import EngineError, ProtocolError, Refused
from tabane.k2i.collectors.api import MAX_ANSWER_BYTES, Facts, Reading
from tabane.k2i.collectors.command import ENVIRONMENT
from tabane.k2i.collectors.parse import check_count, check_facts
from tabane.model import Collect

WORKER = ("-m", "tabane.k2i.collectors.worker")
TRIAL_S = 10.0


class Told(msgspec.Struct):
    """One thing a plugin knows facts about."""

    facts: Facts
    pid: int = 0
    instance: str = ""


class Answer(msgspec.Struct, omit_defaults=True):
    """What a worker says: readings, or what went wrong."""

    readings: list[Told] = []
    error: str = ""


_parse = msgspec.json.Decoder(Answer).decode


class Apart:
    """See the module's text."""

    def __init__(self, collect: Collect) -> None:
        self._collect = collect
        self._program: asyncio.subprocess.Process | None = None

    async def collect(self) -> list[Reading]:
        try:
            answer = await self._ask()
        except BaseException:
            await self.aclose()
            raise
        if answer.error:
            raise Refused(f"{self._collect.kind}: {answer.error}")
        check_count(answer.readings)
        return [Reading(check_facts(t.facts), t.pid, t.instance) for t in answer.readings]

    async def _ask(self) -> Answer:
        if self._program is None:
            self._program = await start_worker(self._collect.kind)
            self._tell(msgspec.json.encode(self._collect))
        self._tell(b"collect")
        kind = self._collect.kind
        assert self._program.stdout is not None
        try:
            line = await self._program.stdout.readuntil(b"\n")
            return _parse(line)
        except asyncio.IncompleteReadError:
            status = await self._program.wait()
            raise EngineError(f"{kind}: its process ended with {status}", status=status) from None
        except asyncio.LimitOverrunError:
            most = MAX_ANSWER_BYTES >> 10
            raise ProtocolError(f"{kind} tells more than {most} KiB at once") from None
        except (msgspec.MsgspecError, RecursionError) as error:
            raise ProtocolError(f"{kind} tells what are no facts: {error}") from None

    def _tell(self, line: bytes) -> None:
        assert self._program is not None
        assert self._program.stdin is not None
        self._program.stdin.write(line + b"\n")

    async def aclose(self) -> None:
        """Idempotent."""
        program, self._program = self._program, None
        if program is not None:
            await end_worker(program)


async def start_worker(kind: str, *options: str) -> asyncio.subprocess.Process:
    """What it prints beside its answers goes nowhere, so that it fills no log and no pipe."""
    return await asyncio.create_subprocess_exec(
        *(sys.executable, *WORKER, *options, kind),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        env=ENVIRONMENT | {"PYTHONPATH": os.pathsep.join(sys.path)},
        limit=MAX_ANSWER_BYTES,
        start_new_session=True,
    )


async def end_worker(program: asyncio.subprocess.Process) -> None:
    """With what it has started, unless that has a session of its own."""
    with suppress(ProcessLookupError):
        os.killpg(program.pid, signal.SIGKILL)
    program._transport.close()  # type: ignore[attr-defined]
    await program.wait()


async def find_trouble(kind: str) -> str:
    """Why a plugin cannot be loaded; empty when it can."""
    program = await start_worker(kind, "--try")
    assert program.stdout is not None
    try:
        async with asyncio.timeout(TRIAL_S):
            return _parse(await program.stdout.readuntil(b"\n")).error
    except TimeoutError:
        return f"it cannot be loaded within {TRIAL_S:g} s"
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, msgspec.MsgspecError):
        return "it ends while it is loaded"
    finally:
        await end_worker(program)
