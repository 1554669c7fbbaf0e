"""This machine's own ps, pgrep and pstree are asked about the same processes, and must agree."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from tabane.clock import SYSTEM
from tabane.k2i import ProcessTable
from tabane.tools.cli import pgrep, ps, pstree
from tabane.tools.cli.asking import Answer
from tabane.tools.cli.letters import take_letters

PLACE_WORDS = 4
MOVING = {"%cpu", "pcpu", "c", "cp", "psr", "etime", "etimes"}
MOVING |= {"start", "lstart", "bsdstart", "start_time", "stime"}
"""Columns whose value moves between two looks."""
ELSEWHERE = {"rss", "rssize", "rsz", "wchan", "wname"}
"""ps reads memory from another file, with the batches that each CPU still has to add; nodes do not
tell where a process waits."""
OURS = {"dc", "node", "namespace", "app", "instance", "class", "inside", "gpid", "incarnation"}
OURS |= {"container", "recent"}
TO_COMPARE = [name for line in ps.list_columns() if (name := line.split()[0])]
TO_COMPARE = [name for name in TO_COMPARE if name not in OURS | MOVING | ELSEWHERE]
ODD = b"odd\x1b[2J(x) \n\xff\xe6\x9d\x9f"
PROGRAM = """\
import os, sys
name, nice, policy = sys.argv[1:]
open("/proc/self/comm", "wb").write(os.fsencode(name)[:15])
os.nice(int(nice))
if policy != "0":
    os.sched_setscheduler(0, int(policy), os.sched_param(0))
print(flush=True)
sys.stdin.read()
"""


def start(name: bytes, nice: int = 0, policy: int = 0, **options: Any) -> subprocess.Popen[bytes]:
    """A process that waits, with a name that it gives itself."""
    argv = [sys.executable, "-c", PROGRAM, os.fsdecode(name), str(nice), str(policy)]
    pipe = subprocess.PIPE
    child = subprocess.Popen(argv, stdin=pipe, stdout=pipe, **options)
    assert child.stdout and child.stdout.readline() == b"\n"
    while b") S" not in Path(f"/proc/{child.pid}/stat").read_bytes():
        os.sched_yield()
    return child


@pytest.fixture(scope="module")
def children() -> Iterator[list[subprocess.Popen[bytes]]]:
    started = [
        start(b"plain"),
        start(b"nicer", nice=5),
        start(b"idle one", policy=os.SCHED_IDLE),
        start(b"batch", policy=os.SCHED_BATCH, start_new_session=True),
        start(ODD),
    ]
    yield started
    for child in started:
        child.communicate()


@pytest.fixture(scope="module")
def rows(children: list[subprocess.Popen[bytes]]) -> list[dict[str, Any]]:
    table = ProcessTable("tokyo/tokyo-1", "i-1")
    found: list[dict[str, Any]] = json.loads(table.render())
    table.close()
    return found


@pytest.fixture(scope="module")
def pids(children: list[subprocess.Popen[bytes]]) -> str:
    return ",".join(str(child.pid) for child in children)


def ours(rows: list[dict[str, Any]], *argv: str) -> list[str]:
    letters, rest = take_letters(list(argv))
    wanted = ps.plan(ps._parser().parse_args(rest), letters)
    return ps.render(ps.choose(rows, wanted), wanted, SYSTEM.wall())


def real(*argv: str, program: str = "ps") -> list[str]:
    """Its lines. COLUMNS would cut them, and its locale is UTF-8, as ours always is."""
    environment = os.environ | {"LC_ALL": "C.UTF-8"}
    environment.pop("COLUMNS", None)
    done = subprocess.run([program, *argv], capture_output=True, env=environment)
    assert not done.stderr
    return done.stdout.decode().splitlines()


def as_ps_escapes(line: str) -> str:
    """ps shows one `?` for each byte that is no text, and for a newline among arguments a blank;
    we say which it was."""
    return re.sub(r"\\x[0-9a-f]{2}", "?", line)


def as_ascii(line: str) -> str:
    """After a byte that is no text ps takes all that is not ASCII for the like."""
    return "".join(c if c.isascii() else "?" * len(c.encode()) for c in line)


def squeeze(line: str) -> str:
    return " ".join(line.split())


@pytest.mark.parametrize("name", TO_COMPARE)
def test_each_column_shows_what_ps_shows(name: str, rows: Any, pids: str) -> None:
    argv = ("-o", f"pid,{name}", "-ww", "-p", pids)
    newline = " " if name in ("args", "cmd", "command") else "?"
    expected = [squeeze(as_ascii(line)) for line in real(*argv)]
    lines = [as_ascii(as_ps_escapes(line)).replace("\\n", newline) for line in ours(rows, *argv)]
    shown = [squeeze(line) for line in lines]
    if name.startswith("etime"):
        expected, shown = ["".join(c for c in x if c.isalpha()) for x in (expected, shown)]
    assert len(shown) == 6
    assert shown == expected


def test_starts_are_those_of_ps(rows: Any, pids: str) -> None:
    """By our clock and their ages; ps adds ticks to the moment of the boot."""
    argv = ("-o", "lstart=", "-p", pids)
    pattern = "%a %b %d %H:%M:%S %Y"
    for shown, expected in zip(ours(rows, *argv), real(*argv), strict=True):
        moments = (datetime.strptime(line.strip(), pattern) for line in (shown, expected))
        assert abs((next(moments) - next(moments)).total_seconds()) <= 60


@pytest.mark.parametrize("argv", [
    "-f", "-F", "-l", "-ly", "-lf", "-j", "-jf", "u", "l", "j", "-o pid,args", "-O rss",
    "-opid,ppid", "o pid,comm", "-o pid=X,comm=Y", "-o pid,comm:3,user:20,tt", "O rss",
])  # fmt: skip
def test_each_format_has_the_columns_of_ps(argv: str, rows: Any, pids: str) -> None:
    heading = ours(rows, *argv.split(), "-p", pids)[0].split()
    at = 0 if "o" in argv.lstrip("-") else PLACE_WORDS
    assert heading[at:] == real(*argv.split(), "-p", pids)[0].split()


CHOICES = [
    "-p {pids}", "p {pids}", "-p{pids}", "--pid {pids}", "-q {first}",
    "--ppid {me}", "-C plain", "-C plain,nicer", "-C nobody", "-s {batch}", "-g {batch}",
    "-p {first} -C batch", "-N --ppid {me} -p 1 -C nicer", "U {uid} -p {first}",
    "-p {pids} --sort=-pid", "-p {pids} --sort ni,-pid", "-p {pids} k -ni,pid",
    "-p {pids} --sort=-comm", "-p {pids} --sort=cls,pid",
]  # fmt: skip


@pytest.mark.parametrize("argv", CHOICES)
def test_the_same_are_chosen_in_the_same_order(
    argv: str, rows: Any, pids: str, children: Any
) -> None:
    mine = {str(child.pid) for child in children}
    first, *_, batch, _odd = (child.pid for child in children)
    facts = {"pids": pids, "first": first, "batch": batch, "me": os.getpid(), "uid": os.getuid()}
    words = [*argv.format(**facts).split(), "-o", "pid="]
    expected = [line.strip() for line in real(*words)]
    shown = [line.strip() for line in ours(rows, *words)]
    assert [pid for pid in shown if pid in mine] == [pid for pid in expected if pid in mine]
    assert "{pids}" not in argv or len(shown) == 5


PATTERNS = [
    "plain", "lai", "^lai", "-x lai", "-x plain", "-x pla..", "-i PLAIN", "PLAIN", "nicer|batch",
    "idle.one", "-f stdin.read", "-f plain$", "-xf plain", "-n .", "-o .", "-n -i N",
    "-s {batch}", "-g {batch}", "-u {uid} plain", "-U {uid} plain", "-u 4711", "-r S", "-r R,D",
    "-O 100000",
]  # fmt: skip


@pytest.mark.parametrize("argv", PATTERNS)
def test_pgrep_finds_the_same(argv: str, rows: Any, children: Any) -> None:
    """Among this process's own children."""
    own = [row for row in rows if row["ppid"] == os.getpid()]
    words = argv.format(batch=children[3].pid, uid=os.getuid()).split(" ")
    expected = [int(line) for line in real("-P", str(os.getpid()), *words, program="pgrep")]
    args = pgrep._parser("pgrep", "").parse_args(words)
    found = pgrep.choose(own, args, pgrep.pattern_test(args))
    assert [row["pid"] for row in found] == expected


SCRIPT = """
cat & cat & (cat; :) & sh -c 'cat; :' & (sh -c "cat & (cat; :) & wait"; :) &
(sh -c "cat & (cat; :) & wait"; :) & nice cat &
exec 0<&-; echo; wait
"""


@pytest.fixture(scope="module")
def family() -> Iterator[int]:
    """The pid of a shell with children, who end when their input does."""
    pipe = subprocess.PIPE
    script = SCRIPT.replace("cat", "cat <&3")
    with subprocess.Popen(["sh", "-c", f"exec 3<&0; {script}"], stdin=pipe, stdout=pipe) as shell:
        assert shell.stdout
        shell.stdout.readline()
        yield shell.pid
        assert shell.stdin
        shell.stdin.close()
        shell.wait()


@pytest.fixture(scope="module")
def kin(family: int) -> Answer:
    """The processes below that shell, once all have become what they shall be."""
    table = ProcessTable("tokyo/tokyo-1", "i-1")
    while True:
        rows = json.loads(table.render())
        below = {family}
        for row in rows:
            if row["ppid"] in below:
                below.add(row["pid"])
        found = [row for row in rows if row["pid"] in below]
        if sum(row["name"] == "cat" for row in found) == 9:
            break
        os.sched_yield()
    table.close()
    return Answer(found, [], 0.0)


@pytest.mark.parametrize(
    "argv", ["", "-p", "-c", "-a", "-ap", "-n", "-np", "-g", "-pg", "-an", "-U", "-u", "-pU"]
)
def test_pstree_draws_the_same(argv: str, kin: Answer, family: int) -> None:
    args = pstree._parser().parse_args(argv.split())
    roots = pstree.choose(kin, str(family), parents=False)
    pstree.sort(roots, by_pid=args.numeric_sort)
    expected = real(*argv.split(), "-T", "-l", str(family), program="pstree")
    shown = pstree.render(roots, args)
    if args.arguments:
        node, *shown = shown
        shown = [shown[0].removeprefix("  `-"), *(line[4:] for line in shown[1:])]
    else:
        node, shown = shown[0][:16], [line[16:] for line in shown]
    assert node.startswith("tokyo/tokyo-1")
    expected = [line.replace("-cexec 3<&0;", "-c exec 3<&0;") for line in expected if line]
    assert [line.split(" -c")[0] for line in shown] == [line.split(" -c")[0] for line in expected]
