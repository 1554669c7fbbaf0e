"""The spawner of tests of drivers, which is to leave nothing either."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from tabane.model import ExitStatus
from tabane.runtimes.api import Command
from tabane.testing.spawner import PlainSpawner

FOR_EVER = ("sleep", "1000")


@pytest.mark.parametrize("logged", [True, False])
@pytest.mark.parametrize("forgotten", [True, False])
async def test_what_runs_when_it_is_closed_ends(
    tmp_path: Path, logged: bool, forgotten: bool
) -> None:
    """Also what nobody asks for any more; the guard sees what is left of it."""
    spawner = PlainSpawner()
    pid = await spawner.spawn(Command("key", FOR_EVER, log=tmp_path / "log" if logged else None))
    if forgotten:
        await spawner.forget("key")
    await spawner.aclose()
    assert not Path(f"/proc/{pid}").exists()


async def test_what_a_forgotten_engine_leaves_behind_ends(tmp_path: Path) -> None:
    """Its pid is known only when the engine has ended."""
    spawner, pid_file = PlainSpawner(), tmp_path / "pid"
    script = f"sleep 0.1; sleep 1000 >/dev/null 2>&1 & echo $! >{pid_file}"
    command = Command("key", ("sh", "-c", script), log=tmp_path / "log", pid_file=pid_file)
    await spawner.spawn(command)
    await spawner.forget("key")
    await spawner.aclose()
    assert not Path(f"/proc/{pid_file.read_text().strip()}").exists()


async def test_an_end_before_the_close_is_told(tmp_path: Path) -> None:
    spawner = PlainSpawner()
    await spawner.spawn(Command("key", FOR_EVER, log=tmp_path / "log"))
    assert await spawner.signal("key", signal.SIGTERM)
    assert await spawner.exited("key") == ExitStatus(signal=signal.SIGTERM)
    assert not await spawner.signal("key", signal.SIGTERM)
    await spawner.aclose()
    assert not await spawner.signal("key", signal.SIGTERM)
