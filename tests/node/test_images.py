"""Images between nodes: copied once to each data center, kept while used, removed for room."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Any

import pytest

from tabane.api import images
from tabane.errors import Conflict, Corrupt, NotFound, TabaneError, Unreachable
from tabane.images import layout, oci, pack, registry
from tabane.images.registry import Progress, Resolved, Tell
from tabane.images.room import NoRoom
from tabane.model import App, AppName
from tabane.node.images import Wanted, describe_coming
from tabane.node.peers import ask_peer
from tabane.references import Reference
from tabane.testing.clock import VirtualClock
from tabane.testing.image_nodes import TOKEN, ImageNode, ImageNodes
from tabane.testing.layouts import make_manifest, put, tar_of, write_index

KEYS = [f"{dc}/{dc}-{number}" for dc in ("tokyo", "osaka") for number in (1, 2, 3)]
SOURCE = "docker://registry.test/team/app:1"
MIB = 1 << 20


def unheard(progress: Progress) -> None: ...


async def sent(chunks: Iterable[bytes]) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


@pytest.fixture
async def nodes(tmp_path: Path) -> AsyncIterator[ImageNodes]:
    async with ImageNodes(tmp_path / "nodes", KEYS) as nodes:
        yield nodes


class PretendRegistry:
    """Has one image, as the layout in a directory; counts how often its layers are fetched."""

    def __init__(self, directory: Path, *layers: bytes) -> None:
        self.layout = directory
        self.image = make_manifest(directory, *layers)
        write_index(directory, self.image)
        self.fetched = 0
        self.logins: list[str] = []
        self.problem: TabaneError | None = None

    def read(self, digest: str) -> bytes:
        return layout.blob_path(self.layout, digest).read_bytes()

    async def resolve(self, reference: Reference, auth: str = "") -> Resolved:
        if self.problem is not None:
            raise self.problem
        data = self.read(self.image.digest)
        config = self.read(oci.parse_manifest(data).config.digest)
        return Resolved(reference.at(self.image.digest), data, config)

    async def fetch(
        self, image: Resolved, incoming: Any, tell: Tell, auth: str = "", clock: Any = None
    ) -> None:
        self.fetched += 1
        self.logins.append(auth)
        incoming.write(image.manifest)
        incoming.write(image.config)
        missing = incoming.missing(image.parsed)
        incoming.claim.spend(sum(layer.size for layer in missing))
        for layer in missing:
            tell(Progress("pull", "registry.test", 0, layer.size))
            await asyncio.sleep(0)
            incoming.write(self.read(layer.digest))


@pytest.fixture
def there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> PretendRegistry:
    pretended = PretendRegistry(tmp_path / "registry", tar_of(a="1" * 100_000), tar_of(b="2"))
    monkeypatch.setattr(registry, "resolve", pretended.resolve)
    monkeypatch.setattr(registry, "fetch", pretended.fetch)
    return pretended


async def bring(node: ImageNode, directory: Path, *layers: bytes) -> str:
    """An image that a client sends."""
    write_index(directory, make_manifest(directory, *layers))
    with pack(f"oci:{directory}", Path("/")) as packed:
        return await node.images.take(sent(packed.chunks()), "", packed.bytes)


def have(nodes: ImageNodes, digest: str) -> list[str]:
    return [key for key, node in nodes.items() if node.images.store.has(digest)]


async def test_a_data_center_pulls_an_image_once(nodes: ImageNodes, there: PretendRegistry) -> None:
    digest = await nodes[KEYS[0]].images.pull(Wanted(source=SOURCE, auth="login"), unheard)
    assert there.fetched == 1 and there.logins == ["login"]
    leader = nodes[KEYS[0]].nodes.home_of(AppName(digest))
    assert have(nodes, digest) == sorted({leader, KEYS[0]}, key=KEYS.index)
    await asyncio.gather(*(node.images.prepare(digest, SOURCE) for node in nodes.values()))
    assert have(nodes, digest) == KEYS and there.fetched == 1
    copy = f"GET /api/v1/blobs/{oci.digest_of(tar_of(b='2'))}"
    given = {key: node.asked.count(copy) for key, node in nodes.items()}
    assert sum(given[key] for key in KEYS[:3]) == 2 + 1, "two neighbours and one of osaka"
    assert sum(given[key] for key in KEYS[3:]) == 2, "two neighbours of the one that has it"
    described = nodes[KEYS[5]].images.store.describe(digest)
    assert (described.source, described.kind) == (SOURCE, "linux")


async def test_at_once_from_everywhere_it_is_pulled_once_for_each_data_center(
    nodes: ImageNodes, there: PretendRegistry
) -> None:
    wanted = [node.images.pull(Wanted(source=SOURCE), unheard) for node in nodes.values()]
    digests = await asyncio.gather(
        *wanted, *(nodes[KEYS[0]].images.pull(w, unheard) for w in [Wanted(source=SOURCE)] * 3)
    )
    assert len(set(digests)) == 1 and have(nodes, digests[0]) == KEYS
    assert 1 <= there.fetched <= 2


async def test_only_what_is_missing_is_copied(nodes: ImageNodes, tmp_path: Path) -> None:
    base = tar_of(base="b" * 100_000)
    one = await bring(nodes[KEYS[0]], tmp_path / "one", base)
    two = await bring(nodes[KEYS[0]], tmp_path / "two", base, tar_of(more="m"))
    told: list[Progress] = []
    await nodes[KEYS[3]].images.pull(Wanted(one), told.append)
    first = told[-1]
    assert first.step == "copy" and first.done_bytes == first.total_bytes > 100_000
    await nodes[KEYS[3]].images.pull(Wanted(two), told.append)
    assert told[-1].total_bytes < 12_000
    image = await nodes[KEYS[3]].images.prepare(two)
    assert sorted(path.name for path in image.tree.iterdir()) == ["base", "more"]


async def test_a_node_that_ends_in_the_middle(nodes: ImageNodes, there: PretendRegistry) -> None:
    """Whoever was to get it: the others go on without."""
    digest = there.image.digest
    leader = nodes[KEYS[0]].nodes.home_of(AppName(digest))
    other = next(key for key in KEYS[:3] if key != leader)
    await nodes.end(leader)
    assert await nodes[other].images.pull(Wanted(source=SOURCE), unheard) == digest
    assert there.fetched == 1


async def test_an_image_that_nobody_has(nodes: ImageNodes) -> None:
    digest = "sha256:" + "0" * 64
    with pytest.raises(NotFound, match="image sha256:000000000000 is on no node that answers"):
        await nodes[KEYS[0]].images.prepare(digest, "rootfs:app")
    assert "POST /api/v1/images/pull" in [r for node in nodes.values() for r in node.asked]


async def test_what_a_registry_says_is_passed_on(nodes: ImageNodes, there: PretendRegistry) -> None:
    digest = there.image.digest
    there.problem = Unreachable("registry.test cannot be reached")
    for key in KEYS[:3]:
        with pytest.raises(Unreachable, match=r"registry.test cannot be reached"):
            await nodes[key].images.prepare(digest, SOURCE)


async def test_an_image_keeps_every_name_by_which_it_was_pulled(
    nodes: ImageNodes, there: PretendRegistry
) -> None:
    node, other = nodes[KEYS[0]], "docker://registry.test/team/other:2"
    digest = await node.images.pull(Wanted(source=SOURCE), unheard)
    for _ in range(2):
        assert await node.images.pull(Wanted(source=other), unheard) == digest
    described = node.images.store.describe(digest)
    assert (described.source, described.sources) == (SOURCE, (SOURCE, other))
    assert len({path.name for path in node.config.paths.images.glob("images/*")}) == 1


async def test_of_a_registry_on_loopback_it_is_told_which_node_looked_there(
    nodes: ImageNodes, there: PretendRegistry
) -> None:
    there.problem = Unreachable("127.0.0.1:5000 cannot be reached")
    with pytest.raises(Unreachable) as caught:
        await nodes[KEYS[0]].images.pull(Wanted(source="docker://127.0.0.1:5000/app"), unheard)
    machine = nodes[KEYS[0]].config.cluster.network.host_address
    assert caught.value.message == (
        f"on {KEYS[0]} 127.0.0.1:5000 cannot be reached: loopback is each node's own, "
        f"name the registry by an address that nodes reach ({machine}: this machine)"
    )


async def test_a_blob_that_was_damaged_on_a_node_is_not_taken(
    nodes: ImageNodes, there: PretendRegistry, tmp_path: Path
) -> None:
    one = nodes[KEYS[0]]
    digest = await one.images.pull(Wanted(source=SOURCE), unheard)
    for key in have(nodes, digest):
        blob = nodes[key].images.store.blob(oci.digest_of(tar_of(b="2")))
        blob.write_bytes(blob.read_bytes().replace(b"2", b"3"))
    other = nodes[KEYS[3]]
    await other.images.pull(Wanted(digest, SOURCE), unheard)
    assert there.fetched == 2
    assert (await other.images.prepare(digest)).kind == "linux"


async def test_a_node_whose_own_copy_is_damaged_gets_another(
    nodes: ImageNodes, there: PretendRegistry, tmp_path: Path
) -> None:
    one, two = nodes[KEYS[0]], nodes[KEYS[3]]
    digest = await one.images.pull(Wanted(source=SOURCE), unheard)
    other = await bring(one, tmp_path / "other", tar_of(b="2"))
    await two.images.pull(Wanted(digest), unheard)
    await two.images.pull(Wanted(other), unheard)
    blob = one.images.store.blob(oci.digest_of(tar_of(b="2")))
    blob.write_bytes(blob.read_bytes()[:-512])
    assert ((await one.images.prepare(digest, SOURCE)).tree / "b").read_text() == "2"
    assert ((await one.images.prepare(other)).tree / "b").read_text() == "2"


async def test_an_image_that_was_made_wrong_is_not_brought_again(
    nodes: ImageNodes, tmp_path: Path
) -> None:
    base = tmp_path / "l"
    document = {"architecture": "amd64", "os": "linux", "rootfs": {"diff_ids": ["sha256:0"]}}
    config = put(base, json.dumps(document).encode(), oci.CONFIG)
    layer = put(base, tar_of(a="1"), oci.LAYER)
    write_index(base, put(base, oci.encode(oci.Manifest(config, (layer,))), oci.MANIFEST))
    with pack("oci:l", tmp_path) as packed:
        digest = await nodes[KEYS[0]].images.take(sent(packed.chunks()), "", packed.bytes)
    for _ in range(2):
        with pytest.raises(Corrupt, match="unpacks to"):
            await nodes[KEYS[0]].images.prepare(digest)
    assert nodes[KEYS[0]].images.store.has(digest)
    assert not [request for node in nodes.values() for request in node.asked]


async def test_who_has_no_token_gets_nothing(nodes: ImageNodes) -> None:
    peer = nodes[KEYS[0]].config.node
    with pytest.raises(TabaneError, match="token"):
        async with ask_peer(peer, "guessed", "GET", "/api/v1/images"):
            pass


# Room


@pytest.fixture
async def small(tmp_path: Path) -> AsyncIterator[ImageNode]:
    """A node whose images may take 4 MiB, and whose clock stands still."""
    clock = VirtualClock()
    async with ImageNodes(tmp_path / "nodes", [KEYS[0]], quota_bytes=4 * MIB, clock=clock) as nodes:
        yield nodes[KEYS[0]]


def pass_time(node: ImageNode, seconds: float = 100.0) -> None:
    assert isinstance(node.clock, VirtualClock)
    node.clock.advance(seconds)


async def test_what_is_unused_makes_room(small: ImageNode, tmp_path: Path) -> None:
    """The longest unused first; never what an app names or an instance runs from."""
    had = {}
    for name in ("named", "runs", "old", "new"):
        layer = tar_of(a=name.ljust(MIB * 9 // 10))
        had[name] = await bring(small, tmp_path / name, layer)
        pass_time(small)
    small.apps.append(App("hello", had["named"]))
    small.running["abc"] = {had["runs"]}
    more = await bring(small, tmp_path / "more", tar_of(a="m" * (MIB * 9 // 10)))
    assert set(small.images.store.digests()) == {more, *had.values()} - {had["old"]}
    with pytest.raises(NoRoom, match="of that are left"):  # `new` goes, `more` came just now
        await bring(small, tmp_path / "large", tar_of(a="l" * 2 * MIB))
    assert {had["named"], had["runs"], more} <= set(small.images.store.digests())
    with pytest.raises(NoRoom, match=r"this alone takes more than the 4\.0 MiB"):
        await bring(small, tmp_path / "huge", tar_of(a="h" * 5 * MIB))


async def test_room_is_made_to_unpack(small: ImageNode, tmp_path: Path) -> None:
    old = await bring(small, tmp_path / "old", tar_of(a="o" * MIB))
    pass_time(small)
    new = await bring(small, tmp_path / "new", tar_of(a="n" * (MIB * 3 // 2)))
    assert (await small.images.prepare(new)).tree.exists()
    assert small.images.store.digests() == [new] and old != new
    assert small.images.store.room.used_bytes <= 4 * MIB


async def test_room_is_made_to_pull(
    small: ImageNode, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pretended = PretendRegistry(tmp_path / "registry", tar_of(a="r" * 3 * MIB))
    monkeypatch.setattr(registry, "resolve", pretended.resolve)
    monkeypatch.setattr(registry, "fetch", pretended.fetch)
    for name in ("one", "two"):
        await bring(small, tmp_path / name, tar_of(a=name.ljust(MIB * 3 // 2)))
        pass_time(small)
    digest = await small.images.pull(Wanted(source=SOURCE), unheard)
    assert small.images.store.digests() == [digest]
    small.apps.append(App("hello", digest))
    with pytest.raises(NoRoom, match="of that are left"):
        await small.images.prepare(digest)
    assert small.images.store.has(digest)


async def test_collecting(small: ImageNode, tmp_path: Path) -> None:
    used = await bring(small, tmp_path / "used", tar_of(a="1"))
    unused = await bring(small, tmp_path / "unused", tar_of(a="2"))
    small.apps.append(App("hello", used))
    assert (await small.images.collect_own()).digests == ()  # they were only just brought
    pass_time(small)
    planned = await small.images.collect_own(dry=True)
    assert planned.digests == (unused,) and planned.bytes > 10_000
    assert small.images.store.has(unused)
    done = await small.images.collect_own()
    assert done.digests == (unused,) and done.bytes == planned.bytes
    assert small.images.store.digests() == [used]


async def test_a_tree_that_lost_its_image_goes_when_nothing_runs_from_it(
    small: ImageNode, tmp_path: Path
) -> None:
    digest = await bring(small, tmp_path / "l", tar_of(a="1"))
    tree = (await small.images.prepare(digest)).tree
    blob = small.images.store.blob(oci.digest_of(tar_of(a="1")))
    blob.write_bytes(b"damaged")
    assert await small.images.store.drop_damaged(digest)
    pass_time(small)
    small.running["abc"] = {digest}
    assert (await small.images.collect_own()).digests == () and tree.exists()
    small.running.clear()
    assert (await small.images.collect_own()).digests == (digest,) and not tree.exists()


async def test_what_is_used_is_not_removed(small: ImageNode, tmp_path: Path) -> None:
    digest = await bring(small, tmp_path / "used", tar_of(a="1"))
    small.running["abc"] = {digest}
    with pytest.raises(Conflict, match="is used by instance abc: remove or stop that first"):
        await small.images.remove_own(digest)
    small.running.clear()
    small.apps.append(App("hello", digest))
    with pytest.raises(Conflict, match="is used by default/hello"):
        await small.images.remove_own(digest)
    small.apps.clear()
    assert (await small.images.remove_own(digest)).digests == (digest,)
    assert (await small.images.remove_own(digest)).digests == ()


# The API


async def ask(node: ImageNode, method: str, target: str, body: Any = None) -> Any:
    """Its answer, line by line."""
    data = json.dumps(body).encode() if body is not None else b""
    async with ask_peer(node.config.node, TOKEN, method, f"/api/v1{target}", data) as answer:
        whole = b"".join([block async for block in answer.blocks()])
    lines = [json.loads(line) for line in whole.splitlines()]
    return lines if target in ("/images/pull", "/images/push") else lines[0]


async def test_lists_of_all_nodes(nodes: ImageNodes, tmp_path: Path) -> None:
    digest = await bring(nodes[KEYS[0]], tmp_path / "l", tar_of(a="1"))
    nodes[KEYS[0]].apps.append(App("hello", digest))
    nodes[KEYS[0]].running["abc"] = {digest}
    await nodes.end(KEYS[5])
    said = await ask(nodes[KEYS[1]], "GET", "/images")
    assert said["silent"] == [KEYS[5]]
    assert [store["node"] for store in said["stores"]] == KEYS[:5]
    row = said["images"][0]
    assert (row["node"], row["digest"], row["kind"]) == (KEYS[0], digest, "linux")
    assert (row["apps"], row["instances"]) == (["default/hello"], ["abc"])
    described = await ask(nodes[KEYS[0]], "GET", f"/images/{digest}/description")
    assert described["manifest"]["schemaVersion"] == 2
    assert described["config"]["architecture"] == "amd64"


async def test_a_pull_tells_how_far_it_is(nodes: ImageNodes, there: PretendRegistry) -> None:
    lines = await ask(nodes[KEYS[0]], "POST", "/images/pull", {"source": SOURCE})
    assert lines[0] == {"step": "resolve", "where": "registry.test"}
    assert lines[-1]["digest"] == there.image.digest and lines[-1]["kind"] == "linux"
    there.problem = NotFound("registry.test has no image")
    lines = await ask(nodes[KEYS[0]], "POST", "/images/pull", {"source": SOURCE})
    assert lines[-1] == {"error": "not_found", "message": "registry.test has no image"}
    assert nodes[KEYS[0]].audited == [f"image-pull {SOURCE}"] * 2


async def test_who_leaves_in_the_middle_ends_the_pull(
    nodes: ImageNodes, there: PretendRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    given_up = asyncio.Event()

    async def never(image: Resolved, incoming: Any, tell: Tell, *_: Any) -> None:
        tell(Progress("pull", "registry.test", 1, 2))
        try:
            await asyncio.Event().wait()
        finally:
            given_up.set()

    monkeypatch.setattr(registry, "fetch", never)
    peer = nodes[KEYS[0]].config.node
    body = json.dumps({"source": SOURCE}).encode()
    async with ask_peer(peer, TOKEN, "POST", "/api/v1/images/pull", body) as answer:
        async for line in answer.lines():
            if json.loads(line)["step"] == "pull":
                break
    await given_up.wait()


async def test_a_pull_without_news_says_so(
    nodes: ImageNodes, there: PretendRegistry, monkeypatch: pytest.MonkeyPatch
) -> None:
    goes_on = asyncio.Event()

    async def slow(reference: Reference, auth: str = "") -> Resolved:
        await goes_on.wait()
        return await there.resolve(reference, auth)

    monkeypatch.setattr(registry, "resolve", slow)
    monkeypatch.setattr(images, "AGAIN_S", 0.01)
    peer = nodes[KEYS[0]].config.node
    body = json.dumps({"source": SOURCE}).encode()
    said = []
    async with ask_peer(peer, TOKEN, "POST", "/api/v1/images/pull", body) as answer:
        async for line in answer.lines():
            said.append(json.loads(line))
            if len(said) == 3:
                goes_on.set()
    assert said[0] == said[1] == said[2] == {"step": "resolve", "where": "registry.test"}
    assert said[-1]["digest"] == there.image.digest


async def test_removing_from_all_nodes(nodes: ImageNodes, tmp_path: Path) -> None:
    digest = await bring(nodes[KEYS[0]], tmp_path / "l", tar_of(a="1"))
    for key in KEYS[1:4]:
        await nodes[key].images.pull(Wanted(digest), unheard)
    had = have(nodes, digest)
    nodes[KEYS[2]].running["abc"] = {digest}
    nodes[KEYS[4]].apps.append(App("hello", digest))
    with pytest.raises(Conflict, match="is used by default/hello: remove the app, or deploy it"):
        await ask(nodes[KEYS[4]], "DELETE", f"/images/{digest}")
    one = await ask(nodes[KEYS[0]], "DELETE", f"/images/{digest}?node={KEYS[1]}")
    assert [row["node"] for row in one["removed"]] == [KEYS[1]]
    nodes[KEYS[4]].apps.clear()
    said = await ask(nodes[KEYS[0]], "DELETE", f"/images/{digest}")
    removed = {row["node"] for row in said["removed"] if row["digests"]}
    assert removed == set(had) - {KEYS[1], KEYS[2]}
    problems = {row["node"]: row["problem"] for row in said["removed"] if row["problem"]}
    assert list(problems) == [KEYS[2]] and "is used by instance abc" in problems[KEYS[2]]
    assert have(nodes, digest) == [KEYS[2]]


async def test_collecting_on_all_nodes_or_one(tmp_path: Path) -> None:
    clock = VirtualClock()
    async with ImageNodes(tmp_path / "nodes", KEYS[:2], clock=clock) as nodes:
        one, two = [await bring(nodes[key], tmp_path / "l", tar_of(a="1")) for key in KEYS[:2]]
        clock.advance(100)
        plan = await ask(nodes[KEYS[0]], "POST", "/images/gc", {"dry_run": True})
        assert [row["digests"] for row in plan["removed"]] == [[one], [two]]
        said = await ask(nodes[KEYS[0]], "POST", "/images/gc", {"node": KEYS[1]})
        assert [(row["node"], row["digests"]) for row in said["removed"]] == [(KEYS[1], [two])]
        assert have(nodes, one) == [KEYS[0]]
        with pytest.raises(NotFound, match="there is no node mars/mars-1"):
            await ask(nodes[KEYS[0]], "POST", "/images/gc", {"node": "mars/mars-1"})


@pytest.mark.parametrize(
    ("progress", "words"),
    [
        (Progress("begin"), "its image web is being pulled"),
        (Progress("resolve", "hub.test"), "its image web is being pulled from hub.test"),
        (
            Progress("copy", "tokyo/tokyo-2", 12 << 20, 80 << 20),
            "its image web is being pulled from tokyo/tokyo-2, 12 of 80 MiB are here",
        ),
    ],
)
def test_how_far_an_image_is_in_words(progress: Progress, words: str) -> None:
    assert describe_coming("web", progress) == words
