from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from tabane.middlecon.inbox import Message
from tabane.middlecon.script_member import run_command


def runs(word: str) -> bool:
    """Whether a process has this word in its command line."""
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes().split(b"\0"):
                return True
        except OSError:
            continue
    return False


async def test_cancelled_while_it_starts_nothing_of_a_command_is_left(tmp_path: Path) -> None:
    """At each step of its start, when the command itself is already as far as it can be."""
    message = cast(Message, SimpleNamespace(sender="somebody", room="r", data=b""))
    for steps in range(12):
        begun = tmp_path / f"begun-{steps}"
        running = asyncio.ensure_future(run_command(f"sleep 987651 & echo >{begun}; wait", message))
        for _ in range(steps):
            await asyncio.sleep(0)
        while Path("/proc/thread-self/children").read_text() and not begun.exists():
            pass  # the loop stands still meanwhile, as on a busy machine
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
    while runs("987651"):  # noqa: ASYNC110 - killed, and on its way out
        await asyncio.sleep(0.01)
