"""What copies of one checkpoint cost, in counts."""

from __future__ import annotations

import asyncio

import pytest
from tests.node.test_saving import SAVES, ask, make_app, rest, until

from tabane.images.checkpoint import Stored
from tabane.testing.dumps import cool
from tabane.testing.pretend import PretendNode


async def test_the_fiftieth_copy_costs_the_store_what_the_second_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """All of them share what was opened once; a copy adds nothing to it that stays."""
    app = make_app(concurrency=1, max=50, stop_after_s=0.05)
    async with PretendNode(app, script=SAVES) as node:
        await ask(node)
        await rest(node)
        store, opened = node.checkpoints.store, []
        (stored,) = store.all()
        bring = store._bring

        async def count(one: Stored) -> None:
            opened.append(one.digest)
            await bring(one)

        monkeypatch.setattr(store, "_bring", count)
        await until(lambda: store.memory.is_warm(stored.digest))
        await cool(store, stored.digest)
        for copies in (2, 50):
            before = node.driver.world.restores[app.key]
            answers = await asyncio.gather(*(ask(node) for _ in range(copies)))
            assert {origin for origin, *_ in answers} == {stored.about.instance}
            assert node.driver.world.restores[app.key] - before <= copies
            assert opened == [stored.digest]
            assert len([*store.memory.directory.iterdir()]) == 1
            await rest(node)
        assert store.memory.users(stored.digest) == 0
