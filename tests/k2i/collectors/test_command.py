"""Commands that print, fail, hang and talk too much."""

from __future__ import annotations

import asyncio
import shlex
import sys
from pathlib import Path

import pytest

from tabane.errors import EngineError, ProtocolError, TabaneError, TimedOut
from tabane.k2i.collectors import command
from tabane.k2i.collectors.api import Reading, Setting
from tabane.k2i.collectors.command import run_here
from tabane.k2i.collectors.dial import NodeDial
from tabane.model import Collect


async def collect(*argv: str) -> list[Reading]:
    return await command.make(
        Setting(Collect("command", command=argv), NodeDial(), run_here)
    ).collect()


def shell(script: str) -> tuple[str, ...]:
    return ("sh", "-c", script)


def runs(word: str) -> list[str]:
    """The processes with a word in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word.encode() in path.read_bytes():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


async def test_what_it_prints() -> None:
    assert await collect("printf", "%s\\n", "temperature 51.5") == [Reading({"temperature": 51.5})]


async def test_little_is_in_its_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET", "token")
    (reading,) = await collect(*shell("env; cat; echo stdin: empty"))
    assert reading.facts.keys() <= {"PATH", "LANG", "PWD", "SHLVL", "_", "OLDPWD", "stdin"}


@pytest.mark.parametrize(
    ("script", "kind", "sentence"),
    [
        ("echo went wrong >&2; exit 3", EngineError, "sh ended with 3: went wrong"),
        ("exit 4", EngineError, "sh ended with 4"),
        ("echo nonsense", ProtocolError, "sh: it prints 'nonsense'"),
        ("yes", ProtocolError, "sh: it prints more than 256 KiB"),
        (
            "head -c 9000000 /dev/zero | tr '\\0' y >&2; exit 5",
            EngineError,
            "sh ended with 5: yyy",
        ),
    ],
)
async def test_what_goes_wrong(script: str, kind: type[TabaneError], sentence: str) -> None:
    with pytest.raises(kind) as caught:
        await collect(*shell(script))
    assert sentence in caught.value.message


async def test_no_such_program() -> None:
    sentence = "/no/such/program cannot be run: No such file or directory"
    with pytest.raises(EngineError, match=sentence):
        await collect("/no/such/program")


async def test_one_that_a_signal_ends() -> None:
    with pytest.raises(EngineError, match="sh ended with 139"):
        await collect(*shell("kill -SEGV $$"))


DAEMON = """
import os, sys, time
for _ in range(3):
    if os.fork():
        os._exit(0) if _ else time.sleep(float(sys.argv[1]))
        print("name 1", flush=True)
        os._exit(0)
    os.setsid()
open(sys.argv[2], "w").close()
time.sleep(1000)
"""


async def test_what_it_leaves_running_is_killed(tmp_path: Path) -> None:
    """Also in a session of its own, with another parent, holding the pipes."""
    begun = tmp_path / "begun-987652"
    daemon = shlex.join([sys.executable, "-c", DAEMON, "0", str(begun)])
    script = f"{daemon}; while ! [ -e {begun} ]; do sleep 0.01; done"
    assert await collect(*shell(script)) == [Reading({"name": 1})]
    assert begun.exists()
    assert runs("987652") == []


async def test_at_its_deadline_daemons_are_killed_too(tmp_path: Path) -> None:
    begun = tmp_path / "begun-987651"
    argv = (sys.executable, "-c", DAEMON, "1000", str(begun))
    taking = asyncio.ensure_future(run_here(argv, 60))
    while not begun.exists():  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.01)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert runs("987651") == []


async def test_too_slow_a_command_is_ended() -> None:
    with pytest.raises(TimedOut, match=r"sleep did not end within 0\.2 s"):
        await run_here(("sleep", "987650"), 0.2)
    assert runs("987650") == []


async def test_it_goes_with_who_started_it(tmp_path: Path) -> None:
    """A collector that is killed leaves nothing either."""
    begun = tmp_path / "begun-987649"
    argv = (sys.executable, "-c", DAEMON, "1000", str(begun))
    program = (
        "import asyncio, sys; from tabane.k2i.collectors.command import run_here; "
        "asyncio.run(run_here(tuple(sys.argv[1:]), 60))"
    )
    starter = await asyncio.create_subprocess_exec(sys.executable, "-c", program, *argv)
    while not begun.exists():  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.01)
    starter.kill()
    await starter.wait()
    while runs("987649"):  # noqa: ASYNC110 - told by the kernel, on its way out
        await asyncio.sleep(0.01)


async def test_cancelled_while_it_starts_nothing_of_it_is_left(tmp_path: Path) -> None:
    """At each step of its start, when the program itself is already as far as it can be."""
    for steps in range(12):
        begun = tmp_path / f"begun-{steps}"
        script = f"sleep 987653 & echo >{begun}; wait"
        taking = asyncio.ensure_future(run_here(shell(script), 60))
        for _ in range(steps):
            await asyncio.sleep(0)
        while Path("/proc/thread-self/children").read_text() and not begun.exists():
            pass  # the loop stands still meanwhile, as on a busy machine
        taking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await taking
    while runs("987653"):  # noqa: ASYNC110 - killed, and on its way out
        await asyncio.sleep(0.01)


async def test_at_its_deadline_it_and_its_children_are_killed(tmp_path: Path) -> None:
    fifo = tmp_path / "begun"
    script = f"sleep 987654 & echo $! > {fifo}; wait"
    taking = asyncio.ensure_future(run_here(shell(script), 60))
    while not (fifo.exists() and fifo.read_text()):  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.01)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    while runs("987654"):  # noqa: ASYNC110 - killed, and on its way out
        await asyncio.sleep(0.01)
