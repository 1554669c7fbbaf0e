"""Threads as tabane ps and pstree show them; this machine's own ps and pstree must agree."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.tools.conftest import EVIL, Pretended, Run, check_refusal
from tests.tools.rows import ROW
from tests.tools.test_ps import answer
from tests.tools.test_ps_oracle import MOVING, OURS, ours, real, squeeze

from tabane.k2i import ProcessTable
from tabane.k2i.threads import add_tasks
from tabane.tools.cli import ps, pstree
from tabane.tools.cli.asking import Answer

PROGRAM = """\
import os, subprocess, sys, threading

def run(name, nice):
    me = threading.get_native_id()
    open(f"/proc/self/task/{me}/comm", "w").write(name)
    os.setpriority(os.PRIO_PROCESS, me, nice)
    ready.release()
    over.wait()

ready, over = threading.Semaphore(0), threading.Event()
children = [subprocess.Popen(["cat"], stdin=subprocess.PIPE) for _ in range(2)]
for name, nice in (("alpha", 0), ("beta", 5), ("beta", 5)):
    threading.Thread(target=run, args=(name, nice)).start()
for _ in range(3):
    ready.acquire()
print(flush=True)
sys.stdin.read()
for child in children:
    child.communicate()
over.set()
"""


@pytest.fixture(scope="module")
def many() -> Iterator[int]:
    """The pid of a process with four threads and two children."""
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", PROGRAM]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as child:
        assert child.stdout and child.stdout.readline() == b"\n"
        yield child.pid
        child.communicate()


@pytest.fixture(scope="module")
def rows(many: int) -> list[dict[str, Any]]:
    table = ProcessTable("tokyo/tokyo-1", "i-1")
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    found = [row for row in table.processes() if many in (row.pid, row.ppid)]
    table.close()
    told: list[dict[str, Any]] = json.loads(
        msgspec.json.encode(add_tasks(Path("/proc"), found, uptime_s))
    )
    return told


COLUMNS = [name for line in ps.list_columns() if (name := line.split()[0])]
COLUMNS = [name for name in COLUMNS if name not in OURS | MOVING | {"args", "cmd", "command"}]
UNTOLD = {"wchan", "wname", "addr", "rss", "rssize", "rsz"}
OF_ALL = {"min_flt", "minflt", "maj_flt", "majflt"}
"""What ps says of the whole process at its first thread; ours is that thread's own."""
NOT_BELOW = {"intpri", "opri", "pri", "priority"}
"""Of which ps shows nonsense with -m."""


@pytest.mark.parametrize("view", ["-L", "-T", "H", "-m", "m"])
def test_each_column_of_threads_is_that_of_ps(view: str, rows: Any, many: int) -> None:
    left_out = UNTOLD | OF_ALL | (NOT_BELOW if "m" in view else set())
    words = [name for name in COLUMNS if name not in left_out]
    argv = (view, "-o", ",".join(f"{name}=" for name in words), "-ww", "-p", str(many))
    shown, expected = (list(map(squeeze, lines)) for lines in (ours(rows, *argv), real(*argv)))
    assert len(shown) == len(expected) == (5 if "m" in view else 4)
    for line, told in zip(shown, expected, strict=True):
        pairs = zip(words, line.split(), told.split(), strict=True)
        assert [pair for pair in pairs if pair[1] != pair[2]] == []


@pytest.mark.parametrize("argv", [
    "-L", "-T", "-Lf", "-Tf", "-LF", "-TF", "-Ll", "-Tl", "-Lly", "-Llf", "-Lj", "-Tj", "-Ljf",
    "u -L", "u -T", "j -L", "j -T", "l -L", "l -T", "u H", "u m", "-f -m", "-L m", "-T -m", "-T H",
    "-L -O ni", "-L -o pid,lwp,tid,spid",
])  # fmt: skip
def test_each_format_of_threads_is_that_of_ps(argv: str, rows: Any, many: int) -> None:
    """But the columns of the place, and in the short ones what is more in ours."""
    short = {"-L": "LWP %CPU NLWP RSS STAT", "-T": "SPID %CPU RSS STAT", "-L m": "LWP %CPU NLWP"}
    heading = ours(rows, *argv.split(), "-p", str(many))[0].split()
    if "-o" not in argv:
        heading = [word for word in heading if word not in ("DC", "NODE", "APP", "CLASS")]
    expected = real(*argv.split(), "-p", str(many))[0].split()
    if argv in ("-L", "-T", "-L m", "-T -m", "-T H"):
        assert [w for w in heading if w in ("PID", "LWP", "SPID")] == expected[:2]
        assert argv not in short or short[argv] in " ".join(w for w in heading if w != "USER")
    else:
        assert heading == expected


def test_each_thread_stands_alone_in_order(rows: Any, many: int) -> None:
    argv = ("-L", "-o", "lwp=", "-p", str(many))
    lwps = [int(line) for line in real(*argv)]
    assert [int(line) for line in ours(rows, *argv)] == lwps
    assert [int(line) for line in ours(rows, *argv, "--sort=-lwp")] == lwps[::-1]


@pytest.mark.parametrize(
    "argv",
    ["", "-t", "-p", "-tp", "-T", "-a", "-ap", "-at", "-c", "-ct", "-g", "-gt", "-n", "-np", "-nt"],
)
def test_pstree_draws_threads_as_pstree_does(argv: str, rows: Any, many: int) -> None:
    args = pstree._parser().parse_args(argv.split())
    roots = pstree.choose(Answer(rows, [], 0.0), str(many), parents=False)
    if not args.hide_threads:
        pstree.hang_threads(roots, by_name=args.thread_names)
    pstree.sort(roots, by_pid=args.numeric_sort)
    expected = real(*argv.split(), "-A", "-l", str(many), program="pstree")
    shown = pstree.render(roots, args)
    if args.arguments:
        shown = [shown[1].removeprefix("  `-"), *(line[4:] for line in shown[2:])]
    else:
        shown = [line[16:] for line in shown]
    ends = [index for index, line in enumerate(expected) if line.startswith(("  |-", "  `-"))]
    if args.arguments:
        assert shown[-len(ends) :] == expected[ends[0] :]
    else:
        assert shown == expected


TASK = {"pid": 42, "tid": 43, "name": f"w{EVIL}", "state": "R", "stat": "R", "processor": 0}
TASK |= {"start_ticks": 999, "cpu_s": 1.0}
BUSY = ROW | {"tasks": [TASK | {"tid": 42, "name": "httpd"}, TASK], "threads": 2}
GUEST = ROW | {"inside": "guest", "pid": 5, "name": "init", "tasks": []}


def test_threads_are_asked_for_once(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(BUSY, GUEST))
    node = pretended.nodes["tokyo"]
    shown = tabane("ps", "-L", "-o", "gpid=,lwp=,comm=")
    evil = "w\\x1b[2J\\x9b31m\\u202e\\r\\nx"
    assert [line.split() for line in shown.out.splitlines()] == [
        ["tokyo/tokyo-1:42", "42", "httpd"],
        ["tokyo/tokyo-1:42", "43", evil],
        ["tokyo/tokyo-1:abc123:5", "5", "init"],
    ]
    assert tabane("pstree", "-t").out == (
        "tokyo/tokyo-1-+-httpd[hello,container]---{" + evil + "}\n"
        "              `-init[hello,container]\n"
    )
    assert [line for line, _ in node.asked] == ["GET /v2/processes?scope=cluster&tasks=yes"] * 2
    assert "{" not in tabane("pstree", "-T").out
    found = json.loads(tabane("ps", "-L", "--json").out)["threads"]
    assert [(row["pid"], row["tid"]) for row in found if "tid" in row] == [(42, 42), (42, 43)]
    below = json.loads(tabane("ps", "-m", "--json").out)["processes"]
    assert [len(row["tasks"]) for row in below] == [2, 0]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("-L -T", "ps: -L and -T exclude each other"),
        ("H m", "ps: H and m exclude each other"),
        ("-L --forest", "ps: threads are in no forest"),
        ("-LH", "ps: threads are in no forest"),
        ("fH", "ps: threads are in no forest"),
        ("-m -H", "ps: threads are in no forest"),
    ],
)
def test_what_ps_refuses_of_threads(argv: str, said: str, tabane: Run) -> None:
    check_refusal(tabane("ps", *argv.split()), 2, said)
