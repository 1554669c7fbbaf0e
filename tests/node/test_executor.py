"""The executor with the fake driver: what a killed agent left is found, or cleared away."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.clock import SYSTEM
from tabane.errors import Conflict, NotFound, Unsupported
from tabane.gateway.activation import InstanceEnded, StillStarting
from tabane.model import (
    App,
    AppName,
    Container,
    Generation,
    Instance,
    InstanceId,
    NodeName,
    Reactive,
    State,
    Volume,
)
from tabane.node import instances
from tabane.node.instances import Executor
from tabane.node.records import Record, write_record
from tabane.node.running import Running, Transition
from tabane.node.volumes import drop_own
from tabane.runtimes.api import Image, InstanceSpec, Link
from tabane.runtimes.fake import FakeDriver, Script
from tabane.runtimes.pods import Pods
from tabane.runtimes.volumes import VolumeFiles
from tabane.supervise import Supervisor
from tabane.testing.drivers import until
from tabane.testing.saved import PretendCheckpoints

NODE, ID = NodeName("tokyo/tokyo-1"), InstanceId("abc")
LINK = Link(1, "127.0.0.1", "127.0.0.1", 1, 1)
APP = App("web", "sha256:1", containers=(Container("cache", "sha256:2"), Container("log", "host")))


class Links:
    """All are the same."""

    def __init__(self) -> None:
        self.claimed = 0

    async def claim(self, id_base: int, *, egress: bool) -> Link:
        self.claimed += 1
        return LINK

    async def release(self, link: Link) -> None:
        self.claimed -= 1

    async def recover(self, in_use: Iterable[Link]) -> None:
        self.claimed = len(list(in_use))


class Services:
    async def open(self, spec: InstanceSpec) -> None: ...

    async def close(self, spec: InstanceSpec) -> None: ...


class Node:
    def __init__(self, directory: Path, tasks: Supervisor, script: Script) -> None:
        self.fake, self.links = FakeDriver(script), Links()
        self.driver = Pods(self.fake)
        self.ends: list[InstanceEnded] = []
        self.says: list[Transition] = []
        self.overs: list[tuple[bool, bool]] = []
        """Of what was said to run no more: whether silently, whether before it was cleared away."""
        self.stills: list[StillStarting] = []
        self.images: list[str] = []
        self.image_comes: asyncio.Event | None = None
        """That one is waited for, of the image `slow`."""
        self.directory = directory / "run"
        self.directory.mkdir()
        self.checkpoints = PretendCheckpoints(directory / "checkpoints")
        self.executor = Executor(
            *(NODE, "one", self.directory, directory / "logs", "/tabane/t"),
            links=self.links,
            services=Services(),
            volumes=VolumeFiles(directory / "volumes"),
            images=self,
            checkpoints=self.checkpoints,
            driver_for=lambda app: self.driver,
            driver_named=lambda name: self.driver,
            clock=SYSTEM,
            tasks=tasks,
            notify=self.on_notice,
            on_change=self.says.append,
            on_over=self.on_over,
        )

    def describe(self, app: App) -> str:
        return f"{app.image} is on its way"

    async def prepare_for(self, app: App) -> Image:
        self.images.append(f"{app.key} {app.image}")
        if app.image == "slow" and self.image_comes is not None:
            await self.image_comes.wait()
        return Image(app.image, self.directory)

    def on_notice(self, notice: Any) -> None:
        if isinstance(notice, InstanceEnded):
            self.ends.append(notice)
        if isinstance(notice, StillStarting):
            self.stills.append(notice)

    def on_over(self, running: Running) -> None:
        self.overs.append((running.is_silent, bool(self.fake.world.lives)))

    async def is_ready(self) -> bool:
        return self.executor.runs(ID) and self.executor.get(ID).instance.state is State.READY

    async def heard_of(self, *slow: InstanceId) -> bool:
        """That they take long."""
        return {still.instance for still in self.stills} >= {*slow}

    async def has_ended(self, *instances: InstanceId) -> bool:
        return {end.instance for end in self.ends} == {*instances}

    def record(self, app: App, state: State = State.PREPARING) -> Record:
        generation = Generation("one", ID, 1)
        instance = Instance(ID, app.key, 1, NODE, generation, state, driver="fake")
        images = tuple(Image(each.image, self.directory) for each in app.containers)
        return Record(instance, app, Image("sha256:1", self.directory), LINK, None, images)

    async def ended(self) -> InstanceEnded:
        async def one() -> bool:
            return bool(self.ends)

        await until(one)
        return self.ends[0]


@pytest.fixture
async def node(tmp_path: Path, request: pytest.FixtureRequest) -> AsyncIterator[Node]:
    script = getattr(request, "param", Script())
    async with Supervisor("test") as tasks:
        made = Node(tmp_path, tasks, script)
        yield made
        for life in list(made.fake.world.lives.values()):
            await life.aclose()


@pytest.mark.parametrize("app", [APP, replace(APP, containers=())], ids=["pod", "alone"])
async def test_an_agent_that_was_killed_while_it_prepared_leaves_nothing(
    node: Node, app: App
) -> None:
    """Its driver had made what is needed, and nobody wrote down the handle."""
    record = node.record(app)
    (node.directory / ID).mkdir()
    write_record(node.directory / ID, record)
    await node.driver.prepare(node.executor.spec(record))
    assert len(node.fake.world.lives) == 1 + len(app.containers)
    await node.executor.recover()
    assert not node.fake.world.lives
    assert (await node.ended()).instance == ID


async def test_while_an_image_comes_its_home_hears_so_and_other_starts_go_on(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "STILL_S", 0.001)
    node.image_comes = asyncio.Event()
    more = node.executor.admission.capacity.limit + 1
    slow = [InstanceId(f"slow{number}") for number in range(more)]
    for one in slow:
        node.executor.start(replace(APP, image="slow", containers=(), port=None), one, SYSTEM.now())
    node.executor.start(replace(APP, containers=(), port=None), ID, SYSTEM.now())
    await until(node.is_ready)
    await until(lambda: node.heard_of(*slow))
    doing = {still.doing for still in node.stills if still.instance in slow}
    assert doing == {"slow is on its way"}
    for one in slow:
        node.executor.stop(one, "not wanted any more")
    node.image_comes.set()
    await until(lambda: node.has_ended(*slow))
    assert {(end.reason, end.failed) for end in node.ends} == {("not wanted any more", False)}
    assert list(node.executor.running) == [ID]
    assert not node.executor.beginning
    assert node.links.claimed == 1


async def test_a_volume_that_is_removed_while_its_apps_image_comes_is_not_made(node: Node) -> None:
    app = replace(APP, image="slow", containers=(), port=None, volumes=(Volume("data", "/data"),))
    agent: Any = SimpleNamespace(
        executor=node.executor, app=lambda key: None, config=SimpleNamespace(key=NODE)
    )
    node.image_comes = asyncio.Event()
    node.executor.start(app, ID, SYSTEM.now())
    with pytest.raises(Conflict, match=f"instance {ID} of default/web still has its volumes"):
        await drop_own(agent, app.key, "data")
    node.executor.stop(ID, "the app was removed")
    with pytest.raises(NotFound, match="has no volume data"):
        await drop_own(agent, app.key, "data")
    node.image_comes.set()
    assert not (await node.ended()).failed
    assert list(node.executor.volumes.sizes()) == []


@pytest.mark.parametrize("node", [Script(start_takes=3600.0)], indirect=True)
async def test_what_waits_for_its_turn_says_so(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(instances, "STILL_S", 0.001)
    app, more = replace(APP, containers=()), node.executor.admission.capacity.limit
    busy = [InstanceId(f"busy{number}") for number in range(more)]
    for one in (*busy, ID):
        node.executor.start(app, one, SYSTEM.now())
    await until(lambda: node.heard_of(ID))
    said = {still.doing for still in node.stills if still.instance == ID}
    assert said <= {"it waits for its turn, 0 other starts of its node are before it", "it begins"}
    (shown,) = [one for one in node.executor.instances() if one.id == ID]
    assert shown.state is State.PREPARING
    assert shown.reason == "it waits for its turn among the starts of its node"
    node.executor.stop(ID, "the app was removed")
    assert (await node.ended()).reason == "the app was removed", "it need not wait to leave"
    await asyncio.gather(*(node.executor.tasks.start("end", _end(node, one)) for one in busy))


async def _end(node: Node, instance: InstanceId) -> None:
    node.fake.world.lives[instance].end(Script().dies)


@pytest.mark.parametrize("node", [Script(start_takes=0.01, fail_start=50)], indirect=True)
async def test_of_a_burst_of_what_does_not_start_those_that_wait_are_not_tried(
    node: Node,
) -> None:
    app = replace(APP, containers=(), port=8000)
    burst = [InstanceId(f"i{number}") for number in range(50)]
    for one in burst:
        node.executor.start(app, one, SYSTEM.now())
    await until(lambda: node.has_ended(*burst))
    tried = [end for end in node.ends if "not tried" not in end.reason]
    assert 1 <= len(tried) <= 2 * node.executor.admission.capacity.limit
    assert node.ends[0] in tried, "its home hears first why"
    assert all(end.failed for end in node.ends)


@pytest.mark.parametrize("node", [Script(prepare_takes=3600.0)], indirect=True)
async def test_what_a_driver_prepares_for_long_is_said(
    node: Node, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instances, "STILL_S", 0.001)
    node.executor.start(replace(APP, containers=()), ID, SYSTEM.now())
    await until(lambda: node.heard_of(ID))
    assert node.stills[-1].doing == node.fake.capabilities.preparation


async def test_each_container_has_its_image(node: Node) -> None:
    node.executor.start(APP, ID, SYSTEM.now())

    async def starting() -> bool:
        return len([life for life in node.fake.world.lives.values() if life.pid]) == 3

    await until(starting)
    assert sorted(node.images) == [
        "default/web sha256:1",
        "default/web.cache sha256:2",
        "default/web.log host",
    ]
    assert node.executor.images() == {ID: {"sha256:1", "sha256:2", "host"}}
    node.fake.world.lives[InstanceId(f"s1-{ID}")].end(replace(Script().dies, code=7))
    end = await node.ended()
    assert end.reason == "container cache exited with code 7"
    assert end.failed and not node.fake.world.lives
    node.executor.release(ID)


@pytest.mark.parametrize("node", [Script(fail_prepare=True)], indirect=True)
async def test_what_could_not_be_prepared_gives_its_link_back(node: Node) -> None:
    node.executor.start(replace(APP, containers=()), ID, SYSTEM.now())
    assert "told to refuse it" in (await node.ended()).reason

    async def free() -> bool:
        return not node.links.claimed and not any(node.directory.iterdir())

    await until(free)
    assert len(node.executor) == 0


@pytest.mark.parametrize("phase", ["prepare", "start"])
async def test_a_mistake_of_ours_ends_the_start(
    node: Node, phase: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It would be starting for ever. Who waits is told where to look, the log has the rest."""

    async def mistaken(*_: Any) -> Any:
        raise KeyError("pid")

    monkeypatch.setattr(node.fake, phase, mistaken)
    node.executor.start(replace(APP, containers=()), ID, SYSTEM.now())
    end = await node.ended()
    assert end.failed and "made a mistake, and its log says which: KeyError" in end.reason
    (told,) = [record for record in caplog.records if record.exc_info]
    assert f"{phase} {ID}" in told.getMessage()
    node.executor.release(ID)


async def test_what_its_driver_refuses(node: Node) -> None:
    node.fake.scripts[AppName("default/web.cache")] = Script(fail_prepare=True)
    record = node.record(APP)
    with pytest.raises(Unsupported, match=r"^container cache: default/web.cache: the fake driver"):
        await node.driver.prepare(node.executor.spec(record))
    assert not node.fake.world.lives


@pytest.mark.parametrize("own_stack", [True, False])
@pytest.mark.parametrize("how", ["failed", "stopped"])
async def test_what_runs_no_more_is_told_before_it_is_cleared_away(
    node: Node, own_stack: bool, how: str
) -> None:
    """And kept in mind with its address, for gateways that ask later."""
    node.driver.capabilities = replace(node.fake.capabilities, own_stack=own_stack)
    node.executor.start(replace(APP, containers=(), port=None), ID, SYSTEM.now())
    await until(node.is_ready)
    assert node.executor.silent() == [] == node.overs
    if how == "failed":
        node.fake.world.lives[ID].end(Script().dies)
    else:
        node.executor.stop(ID, "asked for")
    assert (await node.ended()).failed is (how == "failed")
    assert node.overs == [(own_stack, True)]
    generation = node.executor.get(ID).instance.generation
    assert node.executor.silent() == ([generation] if own_stack else [])
    node.executor.release(ID)
    assert node.executor.silent() == []


@pytest.mark.parametrize("node", [Script(saves=True)], indirect=True)
async def test_a_pod_that_cannot_be_restored_begins_cold_as_a_whole(node: Node) -> None:
    """Of a container there is nothing in its checkpoint."""
    app = replace(APP, reactive=Reactive(checkpoint=True, ready="started"))
    store, other = node.checkpoints.store, InstanceId("def")
    await store.load()
    node.executor.start(app, ID, SYSTEM.now())
    await until(node.is_ready)
    node.executor.saver.save(ID, 1)

    async def is_saved() -> bool:
        return bool(store.all())

    async def is_copied() -> bool:
        states = {one.id: one.state for one in node.executor.instances()}
        return states.get(other) is State.READY

    await until(is_saved)
    node.executor.start(app, other, SYSTEM.now())
    await until(is_copied)
    assert "/cache/state" in node.executor.get(other).note
    assert {*node.fake.world.lives} == {ID, "s1-abc", "s2-abc", other, "s1-def", "s2-def"}


@pytest.mark.parametrize("node", [Script(start_takes=0.05)], indirect=True)
async def test_what_is_stopped_while_its_engine_starts_it_is_not_waited_for(
    node: Node, caplog: pytest.LogCaptureFixture
) -> None:
    """Its driver does not know it any more when the engine is done."""
    app = replace(APP, containers=(), reactive=Reactive(ready="started"))
    node.executor.start(app, ID, SYSTEM.now())

    async def starts() -> bool:
        return node.executor.runs(ID) and node.executor.get(ID).instance.state is State.STARTING

    async def is_over() -> bool:
        return not any(task.get_name().endswith(f"life {ID}") for task in asyncio.all_tasks())

    await until(starts)
    node.executor.stop(ID, "asked for")
    assert (await node.ended()).reason == "asked for"
    await until(is_over)
    assert caplog.messages == []
