"""What a trial leaves in whose middle the agent is killed is ended by the next one's."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tabane.runtimes import load
from tabane.runtimes.cgroups import Cgroup
from tabane.runtimes.trial import cgroup_for, place_for_trials
from tabane.testing.spawner import PlainSpawner

pytestmark = [pytest.mark.real, pytest.mark.usefixtures("no_hybrid")]

AGENT = """
import asyncio, sys
from pathlib import Path
from tabane.runtimes.trial import cgroup_of_trial, place_for_trials

async def main():
    async with place_for_trials(Path(sys.argv[1])) as place:
        own = place / "one"
        own.mkdir()
        async with cgroup_of_trial(own) as cgroup:
            argv = cgroup.entering(("sh", "-c", "echo $$; exec sleep 1000"))
            await asyncio.create_subprocess_exec(*argv, start_new_session=True)
            await asyncio.Event().wait()

asyncio.run(main())
"""
WASM_AGENT = """
import asyncio, sys
from pathlib import Path
from tabane.runtimes import load
from tabane.testing.spawner import PlainSpawner

async def main():
    driver = load("wasmtime", PlainSpawner(), Path(sys.argv[1]))

    async def never(handle):
        print(handle.data["pid"], flush=True)
        await asyncio.Event().wait()

    driver.wait = never
    await driver.probe()

asyncio.run(main())
"""


def begin_and_kill(agent: str, directory: Path) -> int:
    """Kill an agent in the middle of its trial; the pid of what it had started."""
    argv = (sys.executable, "-c", agent, str(directory))
    with subprocess.Popen(argv, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        pid = int(process.stdout.readline())
        process.kill()
    return pid


def left_of(directory: Path) -> list[Path]:
    """Directories and cgroups of trials."""
    trials = list((directory / "trial").glob("*"))
    cgroups = (place for trial in trials for place in Cgroup(cgroup_for(trial)).directories())
    return [*trials, *(place for place in cgroups if place.exists())]


async def test_an_engine_that_a_trial_started_itself(ground: Path) -> None:
    directory = ground / "engine"
    pid = begin_and_kill(AGENT, directory)
    left = left_of(directory)
    assert len(left) > 1 and Path(f"/proc/{pid}").exists()
    async with place_for_trials(directory) as place:
        assert list(place.iterdir()) == []
    assert not any(path.exists() for path in left)
    assert not Path(f"/proc/{pid}/exe").exists(), "it has ended"


async def test_a_host_of_wasmtime(ground: Path) -> None:
    """Its program ends by itself, and nobody sees that."""
    directory = ground / "wasmtime"
    begin_and_kill(WASM_AGENT, directory)
    left = left_of(directory)
    assert len(left) > 2, "two directories, and a cgroup"
    spawner = PlainSpawner()
    probe = await load("wasmtime", spawner, directory).probe()
    await spawner.aclose()
    assert probe.works, probe.reason
    assert not any(path.exists() for path in left)
