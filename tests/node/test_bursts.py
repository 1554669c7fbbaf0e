"""Bursts and herds on a node of a gateway, a home and an executor, with a pretended engine that
counts its starts."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest

from tabane.gateway.decisions import UNPROVEN_AT_ONCE
from tabane.model import App, AppName, ExitStatus, Reactive, State
from tabane.runtimes.fake import Script
from tabane.testing.pretend import PretendNode, fetch

HERD = 1_000
TRIALS = 3
"""After the first few starts: one, and one for each pause that ends while a slow machine is still
at the same herd."""
FOREVER_S = 3600.0
CRASHES = Script(start_takes=0.001, die_after=0.0, dies=ExitStatus(3), listens_after=None)
FAILS = Script(fail_start=10 * HERD)
DEAF = Script(listens_after=None)


def make_app(name: str, **reactive: Any) -> App:
    limits = {"concurrency": 1, "max": 100, "queue": HERD, "stop_after_s": FOREVER_S, **reactive}
    return App(
        name=name,
        image="host",
        command=("serve",),
        port=8000,
        hosts=(f"{name}.test",),
        revision=1,
        reactive=Reactive(**limits),
    )


async def ask(node: PretendNode, name: str, count: int) -> list[tuple[int, bytes]]:
    return await asyncio.gather(*(fetch(node.port, f"{name}.test") for _ in range(count)))


def starts(node: PretendNode) -> Counter[str]:
    return Counter(event.app for event in node.events if event.state is State.STARTING)


async def until(condition: Any) -> None:
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 (many things may make it true)
            await asyncio.sleep(0.001)


@pytest.mark.parametrize("script", [CRASHES, FAILS], ids=["crashes", "engine fails"])
async def test_a_herd_at_a_broken_app_is_few_starts_while_another_wakes(script: Script) -> None:
    broken, well = make_app("broken"), make_app("well")
    async with PretendNode(broken, well) as node:
        node.driver.scripts[broken.key] = script
        herd = asyncio.ensure_future(ask(node, "broken", HERD))
        ((status, body),) = await ask(node, "well", 1)
        assert (status, body[:5]) == (200, b"hello")
        answers = await herd
        assert {status for status, _ in answers} == {503}
        assert all(b"default/broken did not start " in body for _, body in answers)
        assert starts(node)["default/broken"] <= UNPROVEN_AT_ONCE + TRIALS
        again = await ask(node, "broken", HERD)
        assert {status for status, _ in again} == {503}
        assert starts(node)["default/broken"] <= UNPROVEN_AT_ONCE + 2 * TRIALS


async def test_a_herd_at_an_app_that_is_never_ready_is_few_starts() -> None:
    deaf, well = make_app("deaf", start_timeout_s=0.3), make_app("well")
    async with PretendNode(deaf, well) as node:
        node.driver.scripts[deaf.key] = DEAF
        herd = asyncio.ensure_future(ask(node, "deaf", HERD))
        assert [status for status, _ in await ask(node, "well", 3)] == [200] * 3
        assert {status for status, _ in await herd} == {503}
        assert starts(node)["default/deaf"] <= UNPROVEN_AT_ONCE


async def test_a_burst_serves_all_with_an_instance_each_at_the_most() -> None:
    async with PretendNode(make_app("burst")) as node:
        answers = await ask(node, "burst", 100)
        assert {status for status, _ in answers} == {200}
        assert starts(node)["default/burst"] <= 100


async def test_what_thaws_needs_no_turn() -> None:
    """All turns are taken by starts that never end."""
    stuck, rests = make_app("stuck"), make_app("rests", freeze_after_s=0.02)
    async with PretendNode(stuck, rests) as node:
        node.driver.scripts[AppName("default/stuck")] = Script(start_takes=FOREVER_S)
        assert [status for status, _ in await ask(node, "rests", 1)] == [200]
        await until(lambda: node.events[-1].state is State.FROZEN)
        waiting = asyncio.ensure_future(ask(node, "stuck", 50))
        await until(lambda: node.executor.admission.waiting > 0)
        assert node.executor.admission.under_way == node.executor.admission.capacity.limit
        assert [status for status, _ in await ask(node, "rests", 1)] == [200]
        assert [wake.option for wake in node.wakes] == ["cold", "thaw"]
        waiting.cancel()
        await asyncio.wait({waiting})
