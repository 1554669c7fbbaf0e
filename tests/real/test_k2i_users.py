"""Who may touch whose process, with the kernel itself as the oracle."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Iterator

import pytest

from tabane.errors import Denied
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
