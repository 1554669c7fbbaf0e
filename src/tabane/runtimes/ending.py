"""Ending a command inside with all it started: hang up, wait a little, kill what is still there."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable, Iterable
from contextlib import suppress

from tabane.runtimes.process import descendants, ignores, is_same, start_ticks, state

HANGUP_S = 2.0
"""From HUP to KILL: time to write down what is unsaved."""
POLL_S = 0.005

INIT_TIMEOUT_S = 1.0
"""How long init may take from the engine's end until it takes signals: under 1 ms as a rule."""
INIT_POLL_S = 0.001

Known = dict[int, int]
"""Processes, and when each began: a pid that was given to another is let alone."""


async def wait_for_init(pid: int, began: int) -> None:
    """Wait until init takes signals: the kernel drops what a first process does not wait for.

    When tini ignores SIGTTOU, it has blocked the others to wait for them.
    """
    with suppress(TimeoutError):
        async with asyncio.timeout(INIT_TIMEOUT_S):
            while is_same(pid, began) and not ignores(pid, "init", signal.SIGTTOU):  # noqa: ASYNC110
                await asyncio.sleep(INIT_POLL_S)


async def end_below(init: int, began: int) -> None:
    """End all below an init that adopts orphans, and then itself. While it stands still, nothing
    leaves it."""
    if not is_same(init, began):
        return
    _send(init, signal.SIGSTOP)
    while state(init) not in "TZX":  # noqa: ASYNC110 - the kernel sends no event
        await asyncio.sleep(POLL_S)
    for pid in descendants(init):
        _send(pid, signal.SIGHUP)
        _send(pid, signal.SIGCONT)
    await _wait_gone(lambda: descendants(init))
    while is_same(init, began):
        kill_below(init, began, with_it=not descendants(init))
        await asyncio.sleep(POLL_S)


def kill_below(init: int, began: int, *, with_it: bool = True) -> None:
    """Without waiting for it."""
    if is_same(init, began):
        for pid in (*descendants(init), *([init] if with_it else [])):
            _send(pid, signal.SIGKILL)


async def end_session(
    leader: int,
    began: int,
    others: Callable[[], Iterable[int]],
    hang_up: Callable[[], None] = lambda: None,
) -> None:
    """End a session. `others` are processes among which those of the session are; what is below its
    leader belongs to it too, also in sessions of its own. `hang_up` closes its terminal."""
    known: Known = {leader: began}

    def left() -> list[int]:
        below = descendants(leader) if is_same(leader, began) else []
        members = [pid for pid in others() if _session_of(pid) == leader]
        known.update((pid, start_ticks(pid)) for pid in (*below, *members) if pid not in known)
        return [pid for pid, ticks in known.items() if is_same(pid, ticks)]

    found = left()
    hang_up()
    for pid in found:
        _send(pid, signal.SIGHUP)
        _send(pid, signal.SIGCONT)
    await _wait_gone(left)
    while found := left():
        for pid in found:
            _send(pid, signal.SIGKILL)
        await asyncio.sleep(POLL_S)


async def _wait_gone(left: Callable[[], list[int]]) -> None:
    """Until nothing is left, or the time for that is over."""
    with suppress(TimeoutError):
        async with asyncio.timeout(HANGUP_S):
            while left():  # noqa: ASYNC110 - the kernel sends no event
                await asyncio.sleep(POLL_S)


def _session_of(pid: int) -> int:
    with suppress(ProcessLookupError):
        return os.getsid(pid)
    return 0


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)
