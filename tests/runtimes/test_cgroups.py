"""Both versions of cgroups by contract: which files are read and written, and how they look."""

from __future__ import annotations

import asyncio
import subprocess
from pathlib import Path

import pytest

from tabane.errors import Conflict, NotFound, TimedOut
from tabane.runtimes import cgroups
from tabane.runtimes.api import Stats
from tabane.runtimes.cgroups import Cgroup, MemoryUse, parse_hierarchies

MOUNTINFO = """\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
36 31 0:33 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
"""
MEMBERSHIP = "9:name=systemd:/\n4:memory:/x\n2:cpu,cpuacct:/\n5:pids:/\n0::/\n"


def test_hierarchies_of_v1() -> None:
    root = Path("/sys/fs/cgroup")
    assert parse_hierarchies(MOUNTINFO, MEMBERSHIP) == {
        "cpu": root / "cpu,cpuacct",
        "cpuacct": root / "cpu,cpuacct",
        "memory": root / "memory",
        "name=systemd": root / "systemd",
    }


def write(directory: Path, **files: str) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (directory / name.replace("__", ".")).write_text(text)


@pytest.fixture
def v2(tmp_path: Path) -> Cgroup:
    write(
        tmp_path / "t/i",
        cgroup__procs="12\n13\n",
        cgroup__freeze="0",
        cgroup__events="populated 1\nfrozen 0\n",
        cpu__stat="usage_usec 1500\nuser_usec 1000\n",
        memory__current="10000",
        memory__stat="anon 5000\ninactive_file 4000\n",
        memory__events="low 0\noom 2\noom_kill 1\n",
        pids__current="2",
    )
    return Cgroup("/t/i", {"": tmp_path})


@pytest.fixture
def v1(tmp_path: Path) -> Cgroup:
    names = ("cpu", "cpuacct", "memory", "pids", "freezer")
    write(tmp_path / "cpuacct/t/i", cpuacct__usage="1500999")
    write(tmp_path / "pids/t/i", cgroup__procs="12\n13\n0\n", pids__current="2")
    write(tmp_path / "freezer/t/i", freezer__state="THAWED")
    write(
        tmp_path / "memory/t/i",
        memory__usage_in_bytes="10000",
        memory__stat="cache 1\ninactive_file 1\ntotal_inactive_file 4000\n",
        memory__oom_control="oom_kill_disable 0\nunder_oom 0\noom_kill 1\n",
    )
    return Cgroup("/t/i", {name: tmp_path / name for name in names})


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_reading(version: str, request: pytest.FixtureRequest) -> None:
    cgroup: Cgroup = request.getfixturevalue(version)
    assert cgroup.stats() == Stats(cpu_us=1500, memory_bytes=6000, pids=2, oom_kills=1)
    assert cgroup.pids() == [12, 13]
    assert cgroup.oom_kills() == 1


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_the_file_cache_does_not_come_free_with_it(
    version: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """It counts as available already. Files in memory are no cache: the kernel has them among the
    anonymous pages."""
    cgroup: Cgroup = request.getfixturevalue(version)
    directory, prefix = ("", "") if version == "v2" else ("memory", "total_")
    pages = {"active_file": 700, "inactive_file": 300, "active_anon": 500, "inactive_anon": 1500}
    stat = "".join(f"{prefix}{kind} {size}\n" for kind, size in pages.items())
    write(tmp_path / directory / "t/i", memory__stat=stat)
    assert cgroup.memory_use() == MemoryUse(held_bytes=9000, swappable_bytes=2000)


LIMITS = {"cpu": 1.5, "memory_bytes": 1 << 20, "pids": 10}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_what_is_below_belongs_to_it(
    version: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    """Version 1 counts who was killed where that was, version 2 adds it up itself."""
    cgroup: Cgroup = request.getfixturevalue(version)
    before, pids = cgroup.oom_kills(), cgroup.pids()
    processes = tmp_path / ("pids/t/i" if version == "v1" else "t/i")
    write(processes / "main", cgroup__procs="21\n0\n")
    write(processes / "cache/deeper", cgroup__procs="22\n")
    if version == "v1":
        write(tmp_path / "memory/t/i/cache", memory__oom_control="under_oom 0\noom_kill 3\n")
    assert sorted(cgroup.pids()) == [*pids, 21, 22]
    assert cgroup.oom_kills() == before + (3 if version == "v1" else 0)


def test_limits_v2(v2: Cgroup, tmp_path: Path) -> None:
    files = tmp_path / "t/i"
    write(files, cpu__max="max 100000\n", memory__max="max\n", pids__max="max\n")
    assert v2.limits() == {}
    v2.limit({"pids": 20})
    assert v2.limits() == {"pids": 20}
    v2.limit(LIMITS)
    assert v2.limits() == LIMITS
    assert (files / "cpu.max").read_text() == "150000 100000"
    v2.limit({"cpu": 0.001})
    assert v2.limits()["cpu"] == 0.01


def test_limits_v1(v1: Cgroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum with swap is never below the limit of memory alone, on the way neither."""
    write(tmp_path / "cpu/t/i", cpu__cfs_quota_us="-1\n", cpu__cfs_period_us="50000\n")
    unlimited = "9223372036854771712\n"
    memory = {"memory__limit_in_bytes": unlimited, "memory__memsw__limit_in_bytes": unlimited}
    write(tmp_path / "memory/t/i", **memory)
    write(tmp_path / "pids/t/i", pids__max="max\n")
    assert v1.limits() == {}
    v1.limit(LIMITS)
    assert v1.limits() == LIMITS

    written: list[str] = []
    monkeypatch.setattr(cgroups, "_write", lambda path, text: written.append(path.name))
    v1.limit({"memory_bytes": 1 << 19})
    assert written == ["memory.limit_in_bytes", "memory.memsw.limit_in_bytes"]
    v1.limit({"memory_bytes": 1 << 21})
    assert written[2:] == ["memory.memsw.limit_in_bytes", "memory.limit_in_bytes"]


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_limit_below_what_is_used_kills_nobody(
    version: str, request: pytest.FixtureRequest
) -> None:
    cgroup: Cgroup = request.getfixturevalue(version)
    with pytest.raises(Conflict, match="uses 6000 bytes now"):
        cgroup.limit({"memory_bytes": 5999, "pids": 1})


def test_limits_of_one_that_is_gone(tmp_path: Path) -> None:
    for roots in ({"": tmp_path}, dict.fromkeys(("cpu", "cpuacct", "memory", "pids"), tmp_path)):
        cgroup = Cgroup("/gone", roots)
        assert cgroup.limits() == {}
        with pytest.raises(NotFound, match="there is no cgroup /gone any more"):
            cgroup.limit({"pids": 1})


def test_making_v2(tmp_path: Path) -> None:
    """Each one above it hands its controllers down, from the root on."""
    for directory in (tmp_path, tmp_path / "t"):
        write(directory, cgroup__subtree_control="")
    write(tmp_path / "t/i", cpu__max="max", memory__max="max", pids__max="max")
    made = Cgroup("/t/i", {"": tmp_path})
    made.make(LIMITS)
    assert made.limits() == LIMITS
    for directory in (tmp_path, tmp_path / "t"):
        assert (directory / "cgroup.subtree_control").read_text() == "+cpu +memory +pids"


def test_making_v1(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only in the hierarchies that measure, limit or freeze."""
    monkeypatch.setattr(Cgroup, "limit", lambda self, limits: None)
    names = ("blkio", "cpu", "cpuacct", "freezer", "memory", "pids")
    Cgroup("/t/i", {name: tmp_path / name for name in names}).make({})
    assert sorted(path.name for path in tmp_path.iterdir()) == list(names[1:])


def test_entering(tmp_path: Path) -> None:
    """The shell that goes in is the program then, and its own words stay what they are."""
    write(tmp_path / "t/i", cgroup__procs="")
    script = 'echo $$; printf "%s/" "$@"'
    argv = Cgroup("/t/i", {"": tmp_path}).entering(("sh", "-c", script, "sh", "a b", "--", "*"))
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == (tmp_path / "t/i/cgroup.procs").read_text() + "a b/--/*/"
    gone = Cgroup("/gone", {"": tmp_path}).entering(("echo", "never"))
    refused = subprocess.run(gone, capture_output=True, text=True, check=False)
    assert (refused.returncode, refused.stdout) == (126, "")
    assert "/gone/cgroup.procs" in refused.stderr


async def test_freezing_v2(v2: Cgroup, tmp_path: Path) -> None:
    (tmp_path / "t/i/cgroup.events").write_text("populated 1\nfrozen 1\n")
    await v2.freeze()
    assert (tmp_path / "t/i/cgroup.freeze").read_text() == "1"
    v2.thaw()
    assert (tmp_path / "t/i/cgroup.freeze").read_text() == "0"


async def test_what_does_not_freeze_may_run_for_a_moment(
    v1: Cgroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "POLLS_UNTIL_THAW", 3)
    asked: list[str] = []
    write_really = cgroups._write

    def write_slowly(path: Path, text: str) -> None:
        """It gets there only when it was thawed in between."""
        asked.append(text)
        write_really(path, text if "THAWED" in asked else "FREEZING")

    monkeypatch.setattr(cgroups, "_write", write_slowly)
    await v1.freeze()
    assert asked == ["FROZEN", "FROZEN", "FROZEN", "THAWED", "FROZEN"]


async def test_freezing_v1(v1: Cgroup, tmp_path: Path) -> None:
    await v1.freeze()
    assert (tmp_path / "freezer/t/i/freezer.state").read_text() == "FROZEN"
    v1.thaw()
    assert (tmp_path / "freezer/t/i/freezer.state").read_text() == "THAWED"


async def test_what_does_not_freeze_runs_on(
    v2: Cgroup, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cgroups, "FREEZE_TIMEOUT_S", 0.01)
    with pytest.raises(TimedOut, match="did not freeze"):
        await v2.freeze()
    assert (tmp_path / "t/i/cgroup.freeze").read_text() == "0"


async def test_a_freeze_given_up_runs_on(v2: Cgroup, tmp_path: Path) -> None:
    freezing = asyncio.ensure_future(v2.freeze())
    await asyncio.sleep(0)
    assert (tmp_path / "t/i/cgroup.freeze").read_text() == "1"
    freezing.cancel()
    await asyncio.wait([freezing])
    assert (tmp_path / "t/i/cgroup.freeze").read_text() == "0"


async def test_what_is_gone_has_nothing(tmp_path: Path) -> None:
    gone = Cgroup("/gone", {"": tmp_path})
    assert gone.stats() == Stats(0, 0, 0)
    assert gone.memory_use() == MemoryUse(0, 0)
    assert gone.pids() == []
    gone.thaw()
    await gone.remove()


async def test_removal_is_of_all_hierarchies(tmp_path: Path) -> None:
    roots = {name: tmp_path / name for name in ("pids", "freezer", "memory")}
    for root in roots.values():
        (root / "t/i").mkdir(parents=True)
    await Cgroup("/t/i", roots).remove()
    assert [directory for root in roots.values() for directory in (root / "t").iterdir()] == []


def test_crun_on_a_hybrid_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What crun writes where cgroup v2 is not mounted goes with the instance's cgroup."""
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    write(tmp_path / "unified/t/i", cgroup__procs="12")
    (tmp_path / "pids").mkdir()
    asyncio.run(Cgroup("/t/i", {"pids": tmp_path / "pids", "freezer": tmp_path}).remove())
    assert list((tmp_path / "unified/t").iterdir()) == []


def test_controllers_that_are_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cgroups, "ROOT", tmp_path)
    monkeypatch.setattr(cgroups, "find_hierarchies", lambda: {"": tmp_path})
    (tmp_path / "cgroup.controllers").write_text("cpuset cpu io pids\n")
    assert cgroups.missing_controllers() == ["memory"]
    found = {"cpu": tmp_path, "memory": tmp_path, "pids": tmp_path}
    monkeypatch.setattr(cgroups, "find_hierarchies", lambda: found)
    assert cgroups.missing_controllers() == ["cpuacct", "freezer"]
