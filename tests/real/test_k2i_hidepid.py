"""On a procfs that hides others' processes, a user sees their own and nothing fails."""

import json
import os
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytestmark = pytest.mark.real

PROGRAM = """
import ctypes, json, os, pathlib, sys
from tabane.k2i import ProcessTable
from tabane.k2i.procfs import Procfs

directory, hide, outsider = sys.argv[1].encode(), sys.argv[2].encode(), int(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"proc", directory, b"proc", 0, b"hidepid=" + hide) == 0, ctypes.get_errno()
os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
table = ProcessTable(procfs=Procfs(pathlib.Path(os.fsdecode(directory))))
print(json.dumps({
    "seen": [process.pid for process in table.processes()],
    "own": table.record(os.getpid()).tid,
    "records": [record.tid for record in table.records()],
    "outsider": table.record(outsider) is not None,
    "self": os.getpid(),
}))
"""


@pytest.mark.parametrize("hide", ["1", "2"])
def test_hidden_processes_are_left_out(hide: str) -> None:
    with TemporaryDirectory() as directory:  # not below pytest's own, which nobody else may enter
        Path(directory).chmod(0o755)
        command = [sys.executable, "-c", PROGRAM, directory, hide, str(os.getpid())]
        done = subprocess.run(["unshare", "--mount", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answer = json.loads(done.stdout)
    assert answer["own"] == answer["self"]
    assert answer["seen"] == answer["records"] == [answer["self"]]
    assert not answer["outsider"]


SHOWN = """
import ctypes, json, os, pathlib, sys
from tabane.k2i import ProcessTable
from tabane.k2i.api import ANYBODY, redact, sees_all
from tabane.k2i.procfs import Procfs
from tabane.security.identity import Principal

directory, options, pid = os.fsencode(sys.argv[1]), os.fsencode(sys.argv[2]), int(sys.argv[3])
libc = ctypes.CDLL(None, use_errno=True)
assert libc.mount(b"proc", directory, b"proc", 0, options) == 0, ctypes.get_errno()
table = ProcessTable(procfs=Procfs(pathlib.Path(os.fsdecode(directory))))
record = table.record(pid)
principals = (ANYBODY, Principal("peer", 65534), Principal("peer", 0), Principal("token"))
print(json.dumps([
    (record if sees_all(who, table) else redact(record, who)).cmdline for who in principals
]))
table.close()
"""


@pytest.mark.parametrize(("options", "to_anybody"), [("hidepid=0", True), ("hidepid=2", False)])
def test_anybody_sees_the_arguments_that_the_kernel_shows_everybody(
    options: str, to_anybody: bool
) -> None:
    with TemporaryDirectory() as directory:
        command = [sys.executable, "-c", SHOWN, directory, options, str(os.getpid())]
        done = subprocess.run(["unshare", "--mount", *command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    anybody, other, root, token = json.loads(done.stdout)
    name = Path("/proc/self/comm").read_text().rstrip("\n")
    arguments = [word for word in Path("/proc/self/cmdline").read_text().split("\0") if word]
    assert anybody == (arguments if to_anybody else [f"[{name}]"])
    assert other == [f"[{name}]"]
    assert root == token == arguments
