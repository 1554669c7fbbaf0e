"""tabane ps: what a command line asks for, and the lines it gets."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.tools.conftest import Pretended, Run, check_refusal, reply
from tests.tools.rows import HOST, ROW

from tabane.errors import UsageError
from tabane.k2i import ProcessTable
from tabane.model import AppName, Class, Generation, Instance, InstanceId, NodeName, State
from tabane.network import links
from tabane.tools.cli import ps
from tabane.tools.cli.common import cells_of
from tabane.tools.cli.letters import take_letters
from tabane.tools.cli.ps import SPARE
from tabane.tools.cli.screen import clip

NOW = 1_700_000_000.0


@pytest.fixture(autouse=True)
def utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def plan(*argv: str) -> ps.Plan:
    letters, rest = take_letters(list(argv))
    return ps.plan(ps._parser().parse_args(rest), letters)


def lines(*argv: str, rows: Any = (ROW, HOST)) -> list[str]:
    wanted = plan(*argv)
    return ps.render(ps.choose(rows, wanted), wanted, NOW)


def words(*argv: str, rows: Any = (ROW,)) -> list[str]:
    """Of the one line."""
    return lines(*argv, rows=rows)[1].split()


def pids(*argv: str, rows: Any) -> list[int]:
    return [row["pid"] for row in ps.choose(rows, plan(*argv))]


def test_the_usual_columns() -> None:
    assert lines(rows=[ROW, HOST | {"command": "sh"}]) == [
        "DC    NODE    APP   CLASS     PID USER     %CPU RSS STAT  TIME COMMAND",
        "tokyo tokyo-1 hello container  42 www-data  1.5 812 Ss   62:05 httpd -f -p 8000",
        "osaka osaka-1 -     -           7 root      1.5 812 Ss   62:05 sh",
    ]


FORMATS = [
    ("", "PID USER %CPU RSS STAT TIME COMMAND"),
    ("-e", "PID USER %CPU RSS STAT TIME COMMAND"),
    ("ax", "PID USER %CPU RSS STAT TIME COMMAND"),
    ("fax", "PID USER %CPU RSS STAT TIME COMMAND"),
    ("aux", "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"),
    ("-aux", "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"),
    ("-auxww", "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"),
    ("aux ww", "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"),
    ("faux", "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"),
    ("-ef", "UID PID PPID C STIME TTY TIME CMD"),
    ("-e -f", "UID PID PPID C STIME TTY TIME CMD"),
    ("-fC httpd", "UID PID PPID C STIME TTY TIME CMD"),
    ("-eo pid,args", "PID COMMAND"),
    ("-eopid,args", "PID COMMAND"),
    ("axo pid,cmd", "PID CMD"),
    ("axopid,cmd", "PID CMD"),
    ("-o pid,user:20=WHO", "PID WHO"),
    ("-o pid= -o comm=NAME", " NAME"),
]


@pytest.mark.parametrize(("argv", "heading"), FORMATS)
def test_formats(argv: str, heading: str) -> None:
    place = "" if "o" in argv else "DC NODE APP CLASS "
    shown = [column.heading for column in plan(*argv.split()).columns]
    assert " ".join(shown) == place + heading


def test_values_in_the_full_formats() -> None:
    shown = "www-data 42 1.5 0.2 4096 812 ? Ss 21:13 62:05 httpd -f -p 8000"
    assert words("aux")[4:] == shown.split()
    busy = ROW | {"cpu_percent": 250.0}
    shown = "www-data 42 1 99 21:13 ? 01:02:05 httpd"
    assert words("-ef", rows=[busy])[4:12] == shown.split()
    assert words("-o", "pcpu,cp", rows=[busy]) == ["250", "999"]
    assert words("-p", "42", "-o", "gpid,instance,incarnation") == [
        "tokyo/tokyo-1:42",
        "abc123",
        "i-1",
    ]


@pytest.mark.parametrize(
    ("elapsed_s", "shown"),
    [(0.0, "22:13"), (22 * 3600.0, "00:13"), (86399.0, "Nov13"), (400 * 86400.0, "2022")],
)
def test_starts(elapsed_s: float, shown: str) -> None:
    assert words("-o", "stime", rows=[ROW | {"elapsed_s": elapsed_s}]) == [shown]


def test_a_clock_that_is_wrong_there_shows_no_other_starts() -> None:
    columns = "lstart,stime,start,bsdstart,etime"
    right = words("-o", columns)
    assert words("-o", columns, rows=[ROW | {"started_at": 0.0}]) == right
    assert words("-o", columns, rows=[ROW | {"started_at": NOW + 3600}]) == right


def test_long_times() -> None:
    long = ROW | {"cpu_s": 2 * 86400 + 3 * 3600 + 61.9, "elapsed_s": 125.0}
    assert words("-o", "time,bsdtime,times,etime,etimes", rows=[long]) == [
        "2-03:01:01",
        "3061:01",
        "183661",
        "02:05",
        "125",
    ]


def test_namespaces_other_than_the_default_are_shown() -> None:
    assert words(rows=[ROW | {"app": "shop/hello"}])[2] == "shop/hello"


def test_headings() -> None:
    assert lines("-o", "pid=", "-o", "comm=", rows=[ROW]) == ["42 httpd"]
    for argv in (["--no-headers"], ["h"], ["--no-heading"]):
        assert lines(*argv, "-o", "pid", rows=[ROW]) == [" 42"]
    assert lines("-o", "comm:3,user:12,pid", rows=[ROW]) == [
        "COMMAND USER         PID",
        "htt     www-data      42",
    ]


def test_a_command_without_its_path() -> None:
    assert words("axc")[-1] == "httpd"
    assert words("-o", "comm", rows=[ROW | {"state": "Z"}]) == ["httpd", "<defunct>"]


ROOT = ROW | {"uid": 0, "user": "root"}
OTHERS = [
    ROW | {"pid": 1, "ppid": 0, "name": "init", "rss_kib": 5, "tty": "tty1", "session": 1},
    ROW | {"pid": 2, "ppid": 1, "name": "sh", "rss_kib": 50, "tty": "pts/0", "session": 1},
    ROW
    | {"pid": 3, "ppid": 2, "name": "cat", "rss_kib": 20, "uid": 0, "user": "root", "state": "R"},
    ROW | {"pid": 4, "ppid": 2, "name": "dog", "rss_kib": 20, "ruid": 0, "gid": 5, "group": "tty"},
]


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ("-e", [1, 2, 3, 4]),
        ("ax", [1, 2, 3, 4]),
        ("a", [1, 2]),
        ("-a", [2]),
        ("-d", [2, 3, 4]),
        ("-ad", [2]),
        ("r", [3]),
        ("axr", [3]),
        ("-p 1,3", [1, 3]),
        ("-p 1 -p 3", [1, 3]),
        ("p 2", [2]),
        ("1 3", [1, 3]),
        ("1,3", [1, 3]),
        ("-p tokyo/tokyo-1:3", [3]),
        ("tokyo/tokyo-1:3", [3]),
        ("-p osaka/osaka-1:3", []),
        ("--ppid 2", [3, 4]),
        ("-u root", [3]),
        ("-u 0,nobody", [3]),
        ("-U root", [4]),
        ("-U 0", [4]),
        ("U root", [3]),
        ("-C sh,cat", [2, 3]),
        ("-C sh -u root", [2, 3]),
        ("-C sh -N", [1, 3, 4]),
        ("-N -C sh", [1, 3, 4]),
        ("-t pts/0", [2]),
        ("t 1", [1]),
        ("-t /dev/pts/0", [2]),
        ("-s 1", [1, 2]),
        ("-g 1", [1, 2]),
        ("-g tty", [4]),
        ("--group 5", [4]),
        ("--sort=-rss,pid", [2, 3, 4, 1]),
        ("--sort -rss,-pid", [2, 4, 3, 1]),
        ("k comm", [3, 4, 1, 2]),
        ("--sort comm", [3, 4, 1, 2]),
        ("-e -o pid,args --sort=-rss", [2, 3, 4, 1]),
    ],
)  # fmt: skip
def test_which_are_chosen(argv: str, found: list[int]) -> None:
    rows = [row | {"session": row["session"] if row["pid"] < 3 else 9} for row in OTHERS]
    assert pids(*argv.split(), rows=rows) == found


SPARES = [
    *OTHERS,
    ROW | {"pid": 5, "ppid": 1, "name": SPARE, "app": "", "instance": ""},
    ROW | {"pid": 6, "ppid": 1, "name": SPARE, "session": 6},
]
EVERY = [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ("", [1, 2, 3, 4, 6]),
        ("-f", [1, 2, 3, 4, 6]),
        ("u", [1, 2, 3, 4, 6]),
        ("-o pid", [1, 2, 3, 4, 6]),
        ("--forest", [1, 2, 3, 4, 6]),
        ("-ef", EVERY),
        ("-A", EVERY),
        ("aux", EVERY),
        ("axo pid", EVERY),
        ("-d", [2, 3, 4, 5]),
        ("-p 5", [5]),
        (f"-C {SPARE}", [5, 6]),
        ("-u www-data", [1, 2, 4, 5, 6]),
        ("-N -C sh", [1, 3, 4, 5, 6]),
    ],
)
def test_spare_networks_are_shown_to_who_says_which(argv: str, found: list[int]) -> None:
    """One of an app's that is called like that is none."""
    assert links.PARKED == SPARE
    rows = [row | {"session": 6 if row["pid"] == 6 else 1} for row in SPARES]
    assert sorted(pids(*argv.split(), rows=rows)) == found


def test_one_s_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.geteuid", lambda: 0)
    assert pids("x", rows=OTHERS) == pids("ux", rows=OTHERS) == [3]


def test_a_forest() -> None:
    expected = ["CMD", "init", r" \_ sh", r"     \_ cat", r"     \_ dog", "far"]
    far = HOST | {"pid": 2, "ppid": 1, "name": "far"}
    drawn = lines("-eo", "ucmd", "--forest", rows=[*OTHERS, far])
    assert drawn == expected
    assert lines("axfo", "ucmd", rows=[*OTHERS, far]) == expected
    assert lines("-eHo", "ucmd", rows=OTHERS) == ["CMD", "init", "  sh", "    cat", "    dog"]
    siblings = [row | {"ppid": min(row["ppid"], 1)} for row in OTHERS]
    assert lines("-eo", "ucmd", "--forest", "--sort=-pid", rows=siblings)[2:4] == [
        r" \_ dog",
        r" \_ cat",
    ]


@pytest.mark.parametrize(
    "command", ["a\nb", "\x1b[2J", "\x9b31m", "\u202egnp", "\r", "\udcff", "\x07"]
)
def test_nothing_moves_the_cursor(command: str) -> None:
    odd = ROW | {"command": command, "user": command, "name": command, "tty": command}
    for argv in ([], ["aux"], ["-ef", "--forest"], ["-o", "comm,user,tty"]):
        for line in lines(*argv, rows=[odd, odd | {"pid": 43}]):
            assert line.isprintable()
            line.encode()


@given(st.text(), st.integers(1, 200))
def test_any_command_stays_on_its_line_and_in_the_width(command: str, width: int) -> None:
    for line in lines(rows=[ROW | {"command": command}]):
        assert line.isprintable()
        assert cells_of(clip(line, width)) <= width


def test_it_is_cut_to_a_width() -> None:
    wide = lines(rows=[ROW | {"command": "束ね束ね"}])[1]
    start = len(wide) - 4
    assert cells_of(wide) == start + 8
    assert clip(wide, start + 5) == wide[: start + 2]
    assert clip("ab", 1) == "a" and clip("ab", 2) == clip("ab", None) == "ab"


def test_wide_names_keep_the_columns() -> None:
    first, second = lines(rows=[ROW | {"user": "束ね"}, HOST])[1:]
    assert cells_of(first.partition(" 1.5 ")[0]) == cells_of(second.partition(" 1.5 ")[0])


@pytest.mark.parametrize(
    ("argv", "width"),
    [("", None), ("-w", 132), ("w", 132), ("-ww", ps.UNLIMITED), ("-w w", ps.UNLIMITED),
     ("auxww", ps.UNLIMITED), ("--cols 40", 40), ("--width=40", 40)],
)  # fmt: skip
def test_widths(argv: str, width: int | None) -> None:
    assert plan(*argv.split()).width == width


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("auxw!", "'auxw!' is not understood"),
        ("aux ay", "'ay' is not understood"),
        ("-z", "there is no option -z: `tabane ps --help` lists them"),
        ("axe", "'e' of 'axe': nodes do not tell environments"),
        ("-o nope", "there is no column 'nope': `tabane ps L` lists them"),
        ("-o user:0", "'user:0': a width is a number from 1 to 1000"),
        ("--sort=-nope", "there is no column 'nope' to sort by"),
        ("-p x", "ps: 'x' is no number"),
        ("-p ,", "ps: an empty list names nobody"),
        ("axo", "'o' of 'axo' needs a value"),
        ("-o", "-o/--format needs a value after it"),
    ],
)
def test_what_is_not_understood(argv: str, said: str) -> None:
    with pytest.raises(UsageError, match=r"^ps: ") as caught:
        lines(*argv.split())
    assert said in caught.value.message


def test_an_empty_list_of_columns() -> None:
    with pytest.raises(UsageError, match="name columns"):
        plan("-o", "")


def test_every_column_is_listed(tabane: Run) -> None:
    ended = tabane("ps", "L")
    assert (ended.code, ended.err) == (0, "")
    names = [line.split()[0] for line in ended.out.splitlines()]
    assert {"pid", "%cpu", "cmd", "gpid"} <= set(names)
    assert len(lines("-o", ",".join(names), rows=[ROW])) == 2


def answer(*rows: Any, silent: tuple[str, ...] = (), age_s: float = 0.01) -> bytes:
    nodes = [{"node": "tokyo/tokyo-1", "incarnation": "i-1", "age_s": age_s}]
    return reply({"processes": rows, "nodes": nodes, "silent": silent, "at": 0.0})


def test_json_is_the_rows(tabane: Run, pretended: Pretended) -> None:
    odd = ROW | {"command": "\x9b2J束"}
    pretended.begin(tokyo=answer(odd, silent=("ishikari/ishikari-1",)))
    ended = tabane("ps", "--json", "--app", "hello")
    assert json.loads(ended.out) == {"processes": [odd], "silent": ["ishikari/ishikari-1"]}
    assert ended.out.isascii()
    assert (ended.code, ended.err) == (1, "tabane: no answer from ishikari/ishikari-1\n")


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        ("", ""),
        ("--dc osaka", "&dc=osaka"),
        ("--node tokyo/tokyo-1 --app hello", "&node=tokyo/tokyo-1&app=default/hello"),
        ("--user root,0", "&user=root,0"),
        ("--dc tokyo --dc osaka,tokyo", "&dc=tokyo,osaka"),
        ("--node tokyo-1 --node osaka/osaka-1", "&node=tokyo-1,osaka/osaka-1"),
        ("--user root --user 0", "&user=root,0"),
        ("--user a&b=c", "&user=a%26b%3Dc"),
    ],
)
def test_one_question_with_the_filters(
    argv: str, asked: str, tabane: Run, pretended: Pretended
) -> None:
    pretended.begin(tokyo=answer(ROW | {"user": "a&b=c"}), osaka=answer())
    assert tabane("ps", *argv.split(), "-o", "pid=") == (0, "42\n", "")
    assert pretended.nodes["tokyo"].asked == [(f"GET /v2/processes?scope=cluster{asked}", b"")]


def test_each_of_several_must_be_there(tabane: Run, pretended: Pretended) -> None:
    """Also when others have rows: one that is misspelled would be left out without a word."""
    known = [{"namespace": "default", "name": name} for name in ("hello", "rests")]

    def respond(line: str, body: bytes) -> bytes:
        return reply({"apps": known}) if "/api/v1/apps" in line else answer(ROW)

    pretended.begin(tokyo=respond)
    assert tabane("ps", "--app", "hello", "--app", "rests", "-o", "pid=").out == "42\n"
    assert "&app=default/hello,default/rests " in f"{pretended.nodes['tokyo'].asked[0][0]} "
    check_refusal(tabane("ps", "--app", "hello,helo"), 1, "no app default/helo, only default/hello")
    check_refusal(tabane("pkill", "--dc", "tokyo", "--dc", "nara", "x"), 3, "no data center nara")
    check_refusal(tabane("ps", "--node", "tokyo-1,no-1"), 1, "there is no node 'no-1'")
    check_refusal(tabane("ps", "--user", "root", "--user", "nosuch"), 1, "there is no user nosuch")
    check_refusal(tabane("ps", "--dc", "tokyo", "--dc", ","), 2, "--dc: an empty name")


def test_what_is_old_is_said_to_be(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(ROW, age_s=3.04))
    old = "tabane: what is shown is up to 3.0 s old\n"
    assert tabane("ps", "-o", "pid=") == (0, "42\n", old)


def test_those_of_any_app(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer(ROW, HOST))
    found = json.loads(tabane("ps", "--app", "*", "--json").out)
    assert [row["pid"] for row in found["processes"]] == [ROW["pid"]]
    assert "app=" not in pretended.nodes["tokyo"].asked[0][0]
    pretended.nodes["tokyo"].answer = answer(HOST)
    assert tabane("ps", "--app", "*").code == 1


def test_nothing_found_is_told_by_the_exit_code(tabane: Run, pretended: Pretended) -> None:
    known = {"apps": [{"namespace": "default", "name": "hello"}]}
    pretended.begin(
        tokyo=lambda line, _: reply(known) if "/apps" in line else answer(), osaka=answer()
    )
    for argv in ("--dc osaka", "--node osaka-1", "--app hello --dc osaka", "-p 7"):
        ended = tabane("ps", *argv.split())
        assert (ended.code, ended.err) == (1, "")
        assert ended.out.startswith("DC NODE APP")
    said = "there is no app default/nope, only default/hello"
    check_refusal(tabane("ps", "--app", "nope"), 1, said)
    check_refusal(tabane("ps", "--dc", "fax"), 1, "there is no data center fax, only tokyo, osaka")
    check_refusal(tabane("ps", "--node", "nara"), 1, "no node 'nara', only tokyo/tokyo-1, osaka/")


def test_who_may_not_know_which_apps_there_are_finds_nothing(
    tabane: Run, pretended: Pretended
) -> None:
    denied = reply({"error": "denied", "message": "uid 7 may not control this cluster"}, 403)
    pretended.begin(tokyo=lambda line, _: denied if "/apps" in line else answer())
    ended = tabane("ps", "--app", "nope")
    assert (ended.code, ended.err) == (1, "") and ended.out.startswith("DC ")


def test_it_takes_the_rows_of_a_real_table() -> None:
    table = ProcessTable("tokyo/tokyo-1", "i-1")
    mine = Instance(
        InstanceId("x"),
        AppName("default/hello"),
        1,
        NodeName("tokyo/tokyo-1"),
        Generation("i", InstanceId("x"), 1),
        State.READY,
        Class.CONTAINER,
    )
    rows = json.loads(table.render([mine]))
    table.close()
    assert set(ROW) == set(rows[0])
    for argv in ([], ["aux"], ["-ef"]):
        assert "python" in lines(*argv, "-p", str(os.getpid()), rows=rows)[1]


def test_it_starts_light() -> None:
    heavy = ("asyncio", "msgspec", "pydantic", "rich", "fastapi", "http.client", "subprocess")
    program = (
        "import sys\nfrom tabane.tools.cli import ps\nfrom tabane.tools import client\n"
        "from tabane.tools.cli.letters import take_letters\n"
        "letters, rest = take_letters(['aux'])\n"
        "wanted = ps.plan(ps._parser().parse_args(rest), letters)\n"
        f"ps.render(ps.choose([{ROW!r}], wanted), wanted, 0.0)\n"
        f"from tabane.clock import SYSTEM\nprint([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
