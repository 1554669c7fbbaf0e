"""What waits for a slow handler is bounded, in messages and in bytes."""

from __future__ import annotations

import asyncio

import pytest

from tabane.errors import Busy
from tabane.middlecon import inbox


@pytest.mark.parametrize(
    ("limit", "value", "words"),
    [
        ("WAITING_MESSAGES", 3, "3 messages of 30 bytes in all wait for y"),
        ("WAITING_BYTES", 29, "3 messages of 30 bytes in all wait for y"),
    ],
)
@pytest.mark.parametrize("concurrent", [False, True])
async def test_more_is_refused_or_dropped_and_counted(
    cluster, eventually, monkeypatch, limit, value, words, concurrent
):
    monkeypatch.setattr(inbox, limit, value)
    await cluster.hub()
    x, y = await cluster.client("x"), await cluster.client("y")
    go_on = asyncio.Event()
    handled = []

    @y.on_message(concurrent=concurrent)
    async def slow(message):
        await go_on.wait()
        handled.append(message.data)

    for number in range(3):
        x.send_nowait("y", b"%010d" % number)
    with pytest.raises(Busy, match=words):
        await x.send("y", b"more")
    x.send_nowait("y", b"lost")
    await eventually(lambda: y._inbox.dropped == 1)
    go_on.set()
    await eventually(lambda: len(handled) == 3)
    await x.send("y", b"again")
    assert handled == [b"%010d" % number for number in range(3)] + [b"again"]
    assert y._inbox._unfinished == y._inbox._unfinished_bytes == 0
