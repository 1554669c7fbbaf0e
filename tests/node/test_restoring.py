"""What is in the way of a restore without being the checkpoint's fault."""

from __future__ import annotations

import pytest
from tests.node.test_saving import SAVES, ask, make_app, rest, saved, until

from tabane.clock import SYSTEM
from tabane.images.checkpoint import Lease
from tabane.scheduler.attempts import RESTORES
from tabane.testing.dumps import cool
from tabane.testing.pretend import PretendNode


async def test_one_that_there_is_no_room_to_open_is_kept_for_later() -> None:
    """Others' copies have the memory: nothing is wrong with it, however often that happens."""
    app = make_app()
    async with PretendNode(app, script=SAVES) as node:
        first = await saved(node)
        store, attempts = node.checkpoints.store, node.checkpoints.attempts(app, "fake")
        (stored,) = store.all()
        await until(lambda: store.memory.is_warm(stored.digest))
        await cool(store, stored.digest)
        whole = store.memory.limit_bytes
        store.memory.promise(whole - store.memory.used_bytes)
        for count in range(RESTORES + 1):
            origin, identity, _ = await ask(node)
            assert origin == identity and "are in use" in node.wakes[count + 1].note
            assert not attempts.may_restore(SYSTEM.now()) and attempts.dump_in_s(0.0) == 0.0
            attempts.restore_at = 0.0
            await until(lambda: not node.driver.world.lives)
        assert node.checkpoints.discarded == []
        store.memory.give_back(store.memory.used_bytes)
        assert (await ask(node))[0] == first


async def test_one_that_somebody_removes_in_between_is_missed_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with PretendNode(make_app(), script=SAVES) as node:
        first = await saved(node)
        store = node.checkpoints.store
        opens = store.open

        async def too_late(digest: str) -> Lease:
            await store.remove(digest)
            return await opens(digest)

        monkeypatch.setattr(store, "open", too_late)
        origin, identity, _ = await ask(node)
        assert origin == identity != first and "is not here" in node.wakes[1].note
        monkeypatch.undo()
        await rest(node)
        assert node.checkpoints.attempts(make_app(), "fake").restores == 0
