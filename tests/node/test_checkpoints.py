"""Checkpoints of nodes: what they have, what their apps want, what they refuse, and the API."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.node.test_saving import until

from tabane.errors import Conflict, NotFound, Unavailable
from tabane.images.checkpoint import Kept, Stored
from tabane.images.checkpoint.preflight import parse_processor
from tabane.model import App, InstanceId
from tabane.node.peers import ask_peer
from tabane.testing.dumps import cool, read_tree, write_dump
from tabane.testing.image_nodes import TOKEN, ImageNode, ImageNodes

KEYS = ["tokyo/tokyo-1", "tokyo/tokyo-2", "osaka/osaka-1"]
HELLO = App("hello", "host", revision=2, id_base=os.getgid())


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[ImageNodes]:
    async with ImageNodes(tmp_path / "nodes", KEYS) as nodes:
        for node in nodes.values():
            node.apps.append(HELLO)
            await node.checkpoints.load()
            assert node.checkpoints.store.problem == ""
        yield nodes


@pytest.fixture
def node(nodes: ImageNodes) -> ImageNode:
    return nodes[KEYS[0]]


async def make(node: ImageNode, seed: str = "one", app: App = HELLO) -> Stored:
    """As a node's policy does."""
    about = node.checkpoints.about(app, "runc", InstanceId("abc123"))
    async with node.checkpoints.store.dump(app.id_base) as dump:
        write_dump(dump.directory, seed)
        return await dump.keep(about)


def revised(revision: int, **fields: Any) -> App:
    return msgspec.structs.replace(HELLO, revision=revision, **fields)


async def test_what_is_remembered_of_an_instance(node: ImageNode) -> None:
    about = (await make(node)).about
    assert (about.app, about.revision, about.images) == ("default/hello", 2, ("host",))
    assert about.kernel == os.uname().release and about.machine == os.uname().machine
    assert about.versions == {"runc": "1.1.5", "criu": "4.2.1"}
    assert about.instance == "abc123" and about.cpu_flags
    free = node.checkpoints.about(HELLO, "qemu", InstanceId("abc123"))
    assert free.isolation == "microvm"
    assert (free.kernel, free.cpu_flags, free.cpu_vendor) == ("", "", "")


async def test_what_this_node_refuses(node: ImageNode) -> None:
    stored, refusals = await make(node), node.checkpoints.refusals
    assert refusals(stored, HELLO) == ()
    assert refusals(stored, None) == ("default/hello is not deployed",)
    assert refusals(stored, revised(3)) == ("it is of revision 2, and 3 is deployed",)
    node.engines.probes["runc"] = msgspec.structs.replace(
        node.engines.probes["runc"], versions={"runc": "1.1.5", "criu": "4.1"}
    )
    assert refusals(stored, HELLO) == ("criu 4.2.1 made it, and here is 4.1",)
    node.engines.probes["runc"] = msgspec.structs.replace(
        node.engines.probes["runc"], works=False, versions={}
    )
    assert [words.split()[0] for words in refusals(stored, HELLO)] == ["driver", "runc", "criu"]
    image = "sha256:" + "7" * 64
    other = msgspec.structs.replace(HELLO, image=image)
    needs = msgspec.structs.replace(
        stored, about=msgspec.structs.replace(stored.about, images=(image,))
    )
    assert f"its image {image[:19]} is not here" in refusals(needs, other)


async def test_the_latest_that_is_not_refused_is_chosen(node: ImageNode) -> None:
    choose = node.checkpoints.choose
    assert choose(HELLO, "runc") == (None, ())
    old, new = await make(node, "one"), await make(node, "two")
    assert choose(HELLO, "runc") == (new, ()) and choose(revised(3), "runc") == (None, ())
    other = node.checkpoints.about(HELLO, "runc", InstanceId("abc"))
    async with node.checkpoints.store.dump(HELLO.id_base) as dump:
        await dump.keep(msgspec.structs.replace(other, kernel="7.1"))
    assert choose(HELLO, "runc") == (new, ())
    for stored in (new, old):
        await node.checkpoints.store.remove(stored.digest)
    stored, refused = choose(HELLO, "runc")
    assert stored is None and refused[0].startswith("it has state of kernel 7.1, and here is")


async def test_nothing_goes_while_it_is_not_known_what_is_deployed(node: ImageNode) -> None:
    stored = await make(node)
    node.apps.clear()
    node.replica.revision = 0
    assert (await node.checkpoints.collect_own(dry=False)).digests == ()
    node.replica.revision = 7
    assert (await node.checkpoints.collect_own(dry=False)).digests == (stored.digest,)


async def test_what_no_app_as_deployed_would_use_is_collected(node: ImageNode) -> None:
    old = await make(node, "one")
    new = await make(node, "two")
    await make(node, "three", revised(1))
    gone = msgspec.structs.replace(HELLO, name="gone")
    await make(node, "four", gone)
    assert [row.is_wanted for row in node.checkpoints.list_own().checkpoints].count(True) == 1
    planned = await node.checkpoints.collect_own(dry=True)
    assert len(planned.digests) == 3 and old.digest in planned.digests
    assert len(node.checkpoints.store.all()) == 4 and planned.bytes > 0
    async with await node.checkpoints.store.open(old.digest):
        done = await node.checkpoints.collect_own()
        assert len(done.digests) == 2, "what is open stays"
    assert (await node.checkpoints.collect_own()).digests == (old.digest,)
    assert [stored.digest for stored in node.checkpoints.store.all()] == [new.digest]


async def test_what_is_opened_while_others_are_collected_stays(
    node: ImageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = [await make(node, seed, revised(1)) for seed in ("one", "two", "three")]
    store, remove, leases = node.checkpoints.store, node.checkpoints.store.remove, []

    async def slow(digest: str) -> int:
        if not leases:
            leases.append(await store.open(old[1].digest))
        return await remove(digest)

    monkeypatch.setattr(store, "remove", slow)
    done = await node.checkpoints.collect_own()
    assert [*done.digests] == [old[0].digest, old[2].digest] and done.bytes > 0
    assert store.all()[0].digest == old[1].digest
    leases[0].close()
    assert (await node.checkpoints.collect_own()).digests == (old[1].digest,)


async def test_what_copies_share_is_discarded_when_the_last_of_them_has_ended(
    node: ImageNode,
) -> None:
    """As machines do, which have it open for as long as they run; one was put away in between."""
    stored, store = await make(node), node.checkpoints.store
    leases = [await node.checkpoints.open(stored.digest) for _ in range(3)]
    await node.checkpoints.discard(stored.digest)
    assert node.checkpoints.choose(HELLO, "runc") == (None, ())
    assert [one.digest for one in store.all()] == [stored.digest]
    about = node.checkpoints.about(HELLO, "runc", InstanceId("abc124"), Kept())
    async with store.dump(HELLO.id_base) as dump:
        write_dump(dump.directory, "away")
        away = await dump.keep(about)
    leases.append(await node.checkpoints.open(away.digest))
    await node.checkpoints.use_up(away.digest)
    await asyncio.sleep(0)  # it is tried at once, in vain
    for lease in leases:
        assert read_tree(lease.directory)
        lease.close()
    await until(lambda: store.room.used_bytes == store.memory.used_bytes == 0)
    assert store.all() == []


async def test_what_an_agent_leaves_at_its_end_stays(
    node: ImageNode, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = await make(node)
    lease = await node.checkpoints.open(stored.digest)
    await node.checkpoints.discard(stored.digest)
    with monkeypatch.context() as closing:
        closing.setattr(node.tasks, "_closing", True)
        lease.close()
    assert [one.digest for one in node.checkpoints.store.all()] == [stored.digest]


async def test_a_node_whose_key_was_lost_runs_without(nodes: ImageNodes, node: ImageNode) -> None:
    stored = await make(node)
    node.config.paths.checkpoint_key.write_bytes(os.urandom(32))
    await node.checkpoints.load()
    own = node.checkpoints.list_own()
    assert "were sealed with another key" in own.store.problem and own.checkpoints == ()
    with pytest.raises(Unavailable, match="there are no checkpoints here: the checkpoints in"):
        await node.checkpoints.store.open(stored.digest)
    with pytest.raises(Unavailable):
        async with node.checkpoints.store.dump(0):
            pass
    said = await ask(nodes[KEYS[1]], "GET", "/checkpoints")
    assert [bool(store["problem"]) for store in said["stores"]] == [True, False, False]


def test_the_processor_that_a_machine_tells_of() -> None:
    text = "vendor_id\t: GenuineIntel\nflags\t\t: fpu sse avx2\n\nflags : fpu avx2 aes\n"
    assert parse_processor(text) == ("GenuineIntel", "fpu avx2"), "what all of them have"
    assert parse_processor("processor : 0\nFeatures : fp asimd\n") == ("", "")
    vendor, flags = parse_processor(Path("/proc/cpuinfo").read_text())
    assert vendor and "fpu" in flags.split()


# The API


async def ask(node: ImageNode, method: str, target: str, body: Any = None) -> Any:
    data = json.dumps(body).encode() if body is not None else b""
    async with ask_peer(node.config.node, TOKEN, method, f"/api/v1{target}", data) as answer:
        return json.loads(b"".join([block async for block in answer.blocks()]))


async def test_lists_of_all_nodes(nodes: ImageNodes, node: ImageNode) -> None:
    stored = await make(node)
    other = await make(nodes[KEYS[1]], "two")
    await cool(nodes[KEYS[1]].checkpoints.store, other.digest)
    await nodes.end(KEYS[2])
    lease = await node.checkpoints.store.open(stored.digest)
    said = await ask(nodes[KEYS[1]], "GET", "/checkpoints")
    assert said["silent"] == [KEYS[2]]
    first, second = said["checkpoints"]
    assert (first["node"], first["digest"], first["app"]) == (KEYS[0], stored.digest, HELLO.key)
    assert (first["users"], first["is_warm"], first["is_wanted"]) == (1, True, True)
    assert (second["users"], second["is_warm"]) == (0, False)
    assert "cpu_flags" not in first
    store = said["stores"][0]
    assert store["used_bytes"] == stored.disk_bytes and store["memory_used_bytes"] > 0
    lease.close()


async def test_a_description_tells_all_but_what_is_in_it(
    nodes: ImageNodes, node: ImageNode
) -> None:
    stored = await make(node)
    said = await ask(node, "GET", f"/checkpoints/{stored.digest}/description")
    assert said["manifest"]["about"]["cpu_flags"] and said["refusals"] == []
    assert {"core-0.img", "layer/delta.tar"} < {one["path"] for one in said["manifest"]["files"]}
    assert said["manifest"]["chunks"] == [] and (said["chunks"], said["holes"]) == (5, 2)
    node.apps[0] = revised(7)
    said = await ask(node, "GET", f"/checkpoints/{stored.digest}/description")
    assert said["refusals"] == ["it is of revision 2, and 7 is deployed"] and not said["is_wanted"]
    with pytest.raises(NotFound, match=r"checkpoint sha256:\w+ is not here"):
        await ask(nodes[KEYS[1]], "GET", f"/checkpoints/{stored.digest}/description")


async def test_removing_one(nodes: ImageNodes, node: ImageNode) -> None:
    stored = await make(node)
    async with await node.checkpoints.store.open(stored.digest) as directory:
        said = await ask(nodes[KEYS[1]], "DELETE", f"/checkpoints/{stored.digest}")
        problems = {row["node"]: row["problem"] for row in said["removed"] if row["problem"]}
        assert list(problems) == [KEYS[0]] and "is open, for 1: try again" in problems[KEYS[0]]
        assert "pages-1.img" in read_tree(directory)
        with pytest.raises(Conflict):
            await node.checkpoints.remove_own(stored.digest)
    said = await ask(nodes[KEYS[1]], "DELETE", f"/checkpoints/{stored.digest}?node={KEYS[0]}")
    assert said["removed"] == [
        {
            "node": KEYS[0],
            "digests": [stored.digest],
            "bytes": stored.disk_bytes,
            "problem": "",
        }
    ]
    assert node.checkpoints.store.all() == []
    assert nodes[KEYS[1]].audited == [f"checkpoint-rm {stored.digest}"] * 2


async def test_collecting_on_all_nodes_or_one(nodes: ImageNodes) -> None:
    made = [await make(nodes[key], key, revised(1)) for key in KEYS[:2]]
    plan = await ask(nodes[KEYS[2]], "POST", "/checkpoints/gc", {"dry_run": True})
    assert [row["digests"] for row in plan["removed"]] == [[made[0].digest], [made[1].digest], []]
    said = await ask(nodes[KEYS[2]], "POST", "/checkpoints/gc", {"node": KEYS[1]})
    assert [row["digests"] for row in said["removed"]] == [[made[1].digest]]
    assert nodes[KEYS[0]].checkpoints.store.all() == [made[0]]
    with pytest.raises(NotFound, match="there is no node mars/mars-1"):
        await ask(nodes[KEYS[0]], "POST", "/checkpoints/gc", {"node": "mars/mars-1"})
