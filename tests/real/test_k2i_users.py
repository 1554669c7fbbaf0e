"""Who may touch whose process, with the kernel itself as the oracle."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

import msgspec
import pytest

from tabane.errors import Denied
from tabane.k2i import K2i, ProcessTable, Question
from tabane.k2i.kernel import Alone, hold, look
from tabane.k2i.orders import Action, Affinity, Gpid, Limit, Limits, Nice, Order, Signal, name_of
from tabane.k2i.permission import Seen, check_permission
from tabane.security.identity import Principal

pytestmark = pytest.mark.real

ALICE, BOB = 54001, 54002
TARGET = """
import os, resource, sys
gids, uids = eval(sys.argv[1])
os.setgroups([])
os.setresgid(*gids)
os.setresuid(*uids)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
print(flush=True)
sys.stdin.read()
"""
ASKER = """
import json, os, resource, sys
pid, uid = int(sys.argv[1]), int(sys.argv[2])
cpus = os.sched_getaffinity(pid)
os.setgroups([])
os.setresgid(uid, uid, uid)
os.setresuid(uid, uid, uid)
def allows(call, *args):
    try:
        call(*args)
    except PermissionError:
        return False
    return True
print(json.dumps({
    "signal": allows(os.kill, pid, 0),
    "nice": allows(os.setpriority, os.PRIO_PROCESS, pid, 0),
    "affinity": allows(os.sched_setaffinity, pid, cpus),
    "limits": allows(resource.prlimit, pid, resource.RLIMIT_CORE, (0, 0)),
}))
"""
DAEMON = """
import os, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[1])] * 3)
os.setresuid(*[int(sys.argv[1])] * 3)
if sys.argv[2] == "exec":
    os.execv("/bin/sh", ["sh", "-c", "echo; read line"])
print(flush=True)
sys.stdin.read()
"""
LISTER = """
import os, sys
os.setgroups([])
os.setresgid(*[int(sys.argv[2])] * 3)
os.setresuid(*[int(sys.argv[2])] * 3)
print(len(os.listdir(f"/proc/{sys.argv[1]}/fd")))
"""
ACTIONS: list[Action] = [Signal(0), Nice(0), Affinity((0,)), Limits({"core": Limit(0, 0)})]
MIXED = list(itertools.product((ALICE, BOB), repeat=3))
SAME = ((ALICE,) * 3, (BOB,) * 3)
IDS = [
    *((SAME[0], uids) for uids in MIXED),
    *((gids, SAME[0]) for gids in MIXED[1:]),
    (SAME[1], SAME[1]),
    ((0, 0, 0), (0, 0, 0)),
    ((ALICE, 0, 0), (ALICE, 0, 0)),
]


@pytest.fixture(params=IDS, ids=str)
def target(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process with these real, effective and saved group and user ids."""
    command = [sys.executable, "-c", TARGET, str(request.param)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe) as child:
        assert child.stdout
        assert child.stdout.readline() == b"\n"
        yield child.pid


def test_it_allows_what_the_kernel_allows(target: int) -> None:
    asker = [sys.executable, "-c", ASKER, str(target), str(ALICE)]
    oracle = json.loads(subprocess.run(asker, capture_output=True, check=True).stdout)
    with hold(target) as held:
        seen = look(held, Alone())
    gpid = Gpid("", "", "now", target, seen.start_ticks)
    allowed = {name_of(action): is_allowed(gpid, action, seen) for action in ACTIONS}
    assert allowed == oracle


def is_allowed(target: Gpid, action: Action, seen: Seen) -> bool:
    try:
        check_permission(Order((target,), action), target, seen, Principal("peer", ALICE, ALICE))
    except Denied:
        return False
    return True


@pytest.fixture(params=["drop", "exec"])
def dropped(request: pytest.FixtureRequest) -> Iterator[int]:
    """A process that was root's and is Alice's: since it dropped that, or ran another program."""
    command = [sys.executable, "-c", DAEMON, str(ALICE), request.param]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout
        assert child.stdout.readline() == b"\n"
        yield child.pid


@pytest.fixture
def shown(dropped: int) -> bool:
    """Whether the kernel shows Alice its files."""
    lister = [sys.executable, "-c", LISTER, str(dropped), str(ALICE)]
    return subprocess.run(lister, capture_output=True, check=False).returncode == 0


async def test_it_shows_the_files_that_the_kernel_shows(dropped: int, shown: bool) -> None:
    k2i, alice = K2i(ProcessTable()), Principal("peer", ALICE, ALICE)
    pid = {"pid": str(dropped)}
    try:
        files = json.loads(await k2i.answer(Question("files", pid), alice))["files"]
        raw = await k2i.part(Question("raw", {**pid, "files": "io"}), alice)
    finally:
        k2i.close()
        k2i.table.close()
    ((*_, (io,)),) = msgspec.msgpack.decode(raw.rows)["processes"]
    assert bool(files) == (io is not None) == shown


def test_what_was_roots_is_shown_only_after_another_program_ran(
    request: pytest.FixtureRequest, shown: bool
) -> None:
    assert shown == ("exec" in request.node.name)
