"""Trying a driver for real: one tiny instance, with every default on, before anyone needs it.

Each trial has a directory of its own in one for trials, and a cgroup that is named by it: so the
next agent finds what one left that was killed in the middle, and ends it.
"""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from tabane.errors import EngineError, TabaneError
from tabane.model import App, ExitStatus, InstanceId, Resources, new_instance_id
from tabane.runtimes import mounts
from tabane.runtimes.api import Driver, Image, InstanceSpec, Link, Probe
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.process import start_ticks

ID_BASE = 0x7FFF0000
"""The last range below 2^31: no app is given it."""
TIMEOUT_S = 10.0
PROGRAM = Path("/usr/bin/tini-static")
"""Any static program would do; this one is needed anyway."""
TREE = "tree"
"""One name for all trials, as drivers keep a mount for each image."""
Make = Callable[[Link, Path], InstanceSpec]
End = Callable[[Path], Awaitable[None]]

PARK = """
echo unshared; read _
echo 0 > /proc/sys/net/ipv4/ip_unprivileged_port_start
echo ready; read _
"""


@asynccontextmanager
async def parked(id_base: int, address: str = "127.0.0.1") -> AsyncIterator[Link]:
    """A link without a network: a process in user and network namespaces of its own.

    It ends with the block. In a node the network pool makes links; this one is for trials, where
    nothing is connected.
    """
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *("unshare", "--user", "--net", "sh", "-c", PARK), stdin=pipe, stdout=pipe
    )
    assert process.stdin and process.stdout
    try:
        await process.stdout.readline()
        for name in ("uid_map", "gid_map"):
            Path(f"/proc/{process.pid}/{name}").write_text(f"0 {id_base} 65536")
        process.stdin.write(b"\n")
        await process.stdout.readline()
        yield Link(0, address, "127.0.0.1", process.pid, start_ticks(process.pid))
    finally:
        if process.returncode is None:
            process.kill()
        await process.communicate()


async def try_driver(driver: Driver, engine: str, directory: Path) -> Probe:
    """Whether `driver` works here: run a tiny program in an instance and see it exit with 0."""
    if os.geteuid() != 0:
        return Probe(False, f"{engine} needs root here: run the node as root")
    path = shutil.which(engine)
    if path is None:
        return Probe(False, f"{engine} is not installed")
    try:
        async with asyncio.timeout(TIMEOUT_S):
            await run_trial(driver, directory)
    except (TabaneError, OSError) as error:
        return Probe(False, f"{await _version(path)}: {error}")
    except TimeoutError:
        return Probe(False, f"{await _version(path)}: a trial did not end in {TIMEOUT_S:.0f} s")
    return Probe(True, await _version(path))


async def run_trial(driver: Driver, directory: Path, make: Make | None = None) -> None:
    """Run what `make` describes (see `make_spec`) in an instance. Raises when it does not end
    with 0."""
    async with parked(ID_BASE) as link:

        async def discard(former: Path) -> None:
            await driver.discard(_describe(former.name, link, former))

        async with place_for_trials(directory, discard) as place:
            await _run(driver, (make or make_spec)(link, place))


async def end_trial(directory: Path) -> None:
    """Kill what runs of the trial with this directory, by its cgroup."""
    await Cgroup(cgroup_for(directory)).remove()


def cgroup_for(directory: Path) -> str:
    return f"/tabane-trial-{directory.name}"


@asynccontextmanager
async def cgroup_of_trial(directory: Path) -> AsyncIterator[Cgroup]:
    """For a trial that starts its engine itself."""
    cgroup = Cgroup(cgroup_for(directory))
    cgroup.make({})
    try:
        yield cgroup
    finally:
        await cgroup.remove()


@asynccontextmanager
async def place_for_trials(directory: Path, end: End = end_trial) -> AsyncIterator[Path]:
    """Where each trial makes a directory of its own. What was left there by an agent that was
    killed goes before, `end` having been called with each."""
    place = directory / "trial"
    place.mkdir(mode=0o711, parents=True, exist_ok=True)
    try:
        for former in place.iterdir():
            if former.name != TREE:
                await end(former)
            mounts.remove_tree(former)
        yield place
    finally:
        mounts.remove_tree(place)


async def _run(driver: Driver, spec: InstanceSpec) -> None:
    handle = await driver.prepare(spec)
    try:
        handle = await driver.start(spec, handle)
        status = await driver.wait(handle)
    finally:
        await driver.destroy(handle)
    if status != ExitStatus():
        raise EngineError(f"a trial program {status.describe()}: {spec.log.read_text()}")


def make_spec(link: Link, place: Path) -> InstanceSpec:
    """What is tried, in a directory for trials."""
    identity = new_instance_id()
    spec = _describe(identity, link, place / identity)
    for directory in (spec.directory, spec.image.tree):
        directory.mkdir()
    shutil.copy(PROGRAM, spec.image.tree / "trial")
    spec.image.tree.chmod(0o755)
    return spec


def _describe(identity: str, link: Link, directory: Path) -> InstanceSpec:
    app = App(
        name="trial",
        namespace="tabane",
        image="trial",
        command=("/trial", "--version"),
        resources=Resources(memory_bytes=64 << 20, pids=16, disk_bytes=1 << 20),
        id_base=ID_BASE,
    )
    image, log = Image(f"trial-{identity}", directory.parent / TREE), directory / "log"
    cgroup = cgroup_for(directory)
    return InstanceSpec(InstanceId(identity), app, image, link, directory, log, cgroup)


async def _version(path: str) -> str:
    """The first line of what the engine says of its version."""
    engine = await asyncio.create_subprocess_exec(
        path, "--version", stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.DEVNULL
    )
    output, _ = await engine.communicate()
    return output.decode(errors="replace").partition("\n")[0]
