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

from tabane.errors import NotFound, UsageError
from tabane.k2i import ProcessTable
from tabane.model import AppName, Class, Generation, Instance, InstanceId, NodeName, State
from tabane.tools import client
from tabane.tools.cli import ps
from tabane.tools.cli.common import cells_of

NOW = 1_700_000_000.0
ROW: dict[str, Any] = {
    "dc": "tokyo",
    "node": "tokyo-1",
    "app": "default/hello",
    "instance": "abc123",
    "class": "container",
    "pid": 42,
    "ppid": 1,
    "uid": 33,
    "user": "www-data",
    "cpu_percent": 1.5,
    "memory_percent": 0.2,
    "vsz_kib": 4096,
    "rss_kib": 812,
    "tty": "?",
    "stat": "Ss",
    "elapsed_s": 3600.0,
    "cpu_s": 3725.4,
    "nice": 0,
    "threads": 1,
    "start_ticks": 100,
    "name": "httpd",
    "command": "httpd -f -p 8000",
}
HOST = ROW | {"dc": "osaka", "node": "osaka-1", "app": "", "class": "", "pid": 7, "user": "root"}


@pytest.fixture(autouse=True)
def utc() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TZ", "UTC")
        time.tzset()
        yield
    time.tzset()


def lines(*rows: dict[str, Any], columns: Any = ps.SHORT, width: int | None = None) -> list[str]:
    return ps.render(rows, columns, NOW, width)


def test_short() -> None:
    assert lines(ROW, HOST | {"command": "sh"}) == [
        "DC    NODE    APP   CLASS     PID USER     %CPU RSS STAT  TIME COMMAND",
        "tokyo tokyo-1 hello container  42 www-data  1.5 812 Ss   62:05 httpd -f -p 8000",
        "osaka osaka-1 -     -           7 root      1.5 812 Ss   62:05 sh",
    ]


def test_aux() -> None:
    heading, line = (" ".join(text.split()[4:]) for text in lines(ROW, columns=ps.USER))
    assert heading == "USER PID %CPU %MEM VSZ RSS TTY STAT START TIME COMMAND"
    assert line == "www-data 42 1.5 0.2 4096 812 ? Ss 21:13 62:05 httpd -f -p 8000"


def test_ef() -> None:
    row = ROW | {"cpu_percent": 250.0}
    heading, line = (" ".join(text.split()[4:]) for text in lines(row, columns=ps.FULL))
    assert heading == "UID PID PPID C STIME TTY TIME CMD"
    assert line == "www-data 42 1 99 21:13 ? 01:02:05 httpd -f -p 8000"


@pytest.mark.parametrize(
    ("elapsed_s", "shown"),
    [(0.0, "22:13"), (86399.0, "22:13"), (86400.0, "Nov13"), (400 * 86400.0, "2022")],
)
def test_starts(elapsed_s: float, shown: str) -> None:
    assert lines(ROW | {"elapsed_s": elapsed_s}, columns=ps.FULL)[1].split()[8] == shown


def test_long_cpu_times() -> None:
    row = ROW | {"cpu_s": 2 * 86400 + 3 * 3600 + 61.9}
    assert "2-03:01:01" in lines(row, columns=ps.FULL)[1]
    assert "3061:01" in lines(row, columns=ps.USER)[1]


def test_namespaces_other_than_the_default_are_shown() -> None:
    assert lines(ROW | {"app": "shop/hello"})[1].split()[2] == "shop/hello"


@pytest.mark.parametrize(
    "command", ["a\nb", "\x1b[2J", "\x9b31m", "\u202egnp", "\r", "\udcff", "\x07"]
)
def test_nothing_moves_the_cursor(command: str) -> None:
    heading, line = lines(ROW | {"command": command, "user": command})
    assert line.isprintable() and heading.isprintable()
    line.encode()


@given(st.text(), st.integers(1, 200))
def test_any_command_stays_on_its_line_and_in_the_width(command: str, width: int) -> None:
    for line in lines(ROW | {"command": command}, width=width):
        assert line.isprintable()
        assert cells_of(line) <= width


def test_it_is_cut_to_a_width() -> None:
    whole = lines(ROW | {"command": "束ね束ね"})
    assert [len(line) for line in lines(ROW, width=20)] == [20, 20]
    start = len(whole[1]) - 4
    assert lines(ROW | {"command": "束ね束ね"}, width=start + 5)[1] == whole[1][: start + 2]
    assert cells_of(whole[1]) == start + 8


def test_wide_names_keep_the_columns() -> None:
    first, second = lines(ROW | {"user": "束ね"}, HOST)[1:]
    assert cells_of(first.partition(" 1.5 ")[0]) == cells_of(second.partition(" 1.5 ")[0])


def test_selection() -> None:
    rows = [ROW, HOST, ROW | {"pid": 9}]
    pids = [(row["dc"], row["pid"]) for row in ps.select(rows)]
    assert pids == [("osaka", 7), ("tokyo", 9), ("tokyo", 42)]
    assert ps.select(rows, dc="osaka") == ps.select(rows, node="osaka-1") == [HOST]
    assert ps.select(rows, node="osaka/osaka-1") == [HOST]
    assert ps.select(rows, node="tokyo/osaka-1") == []
    assert (
        ps.select(rows, app="hello")
        == ps.select(rows, app="default/hello")
        == ps.select(rows, dc="tokyo")
    )
    assert ps.select(rows, app="nothing") == []


class Answer:
    """A cluster that answers this."""

    nodes = ("tokyo/tokyo-1", "osaka/osaka-1")

    def __init__(self, *rows: dict[str, Any], silent: tuple[str, ...] = ()) -> None:
        self.answer = {"processes": list(rows), "silent": list(silent)}

    def __call__(self, root: object) -> "Answer":
        return self

    def get(self, path: str) -> Any:
        if path == "/api/v1/apps":
            return {"apps": [{"namespace": "default", "name": "hello"}]}
        assert path == "/api/v1/ps"
        return self.answer


def run(monkeypatch: pytest.MonkeyPatch, answer: Answer, *argv: str) -> int:
    monkeypatch.setattr(client, "Cluster", answer)
    return ps.ps(list(argv))


@pytest.mark.parametrize(
    ("argv", "heading"),
    [
        ((), "RSS STAT TIME COMMAND"),
        (("-e",), "RSS STAT TIME COMMAND"),
        (("ax",), "RSS STAT TIME COMMAND"),
        (("aux",), "STAT START TIME COMMAND"),
        (("-ef",), "STIME TTY TIME CMD"),
        (("-e", "-f"), "STIME TTY TIME CMD"),
        (("-l",), "STIME TTY TIME CMD"),
        (("-aef",), "STIME TTY TIME CMD"),
        (("-aux",), "STAT START TIME COMMAND"),
        (("fax",), "RSS STAT TIME COMMAND"),
        (("auxww",), "STAT START TIME COMMAND"),
        (("faux",), "STAT START TIME COMMAND"),
        (("aux", "ww"), "STAT START TIME COMMAND"),
    ],
)
def test_styles(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    argv: tuple[str, ...],
    heading: str,
) -> None:
    assert run(monkeypatch, Answer(ROW, HOST), *argv) == 0
    out = capsys.readouterr().out.splitlines()
    assert len(out) == 3
    assert out[0].split()[-4:] == heading.split()
    assert out[2].endswith("httpd -f -p 8000")


def test_json_is_the_rows(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = ROW | {"command": "\x9b2J束"}
    answer = Answer(odd, HOST, silent=("ishikari/ishikari-1",))
    assert run(monkeypatch, answer, "--json", "--app", "hello") == 1
    out, err = capsys.readouterr()
    assert json.loads(out) == {"processes": [odd], "silent": ["ishikari/ishikari-1"]}
    assert out.replace("\n", "").isprintable()
    assert err == "tabane: no answer from ishikari/ishikari-1\n"


def test_nothing_found_is_told_by_the_exit_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for line in (("--dc", "osaka"), ("--node", "osaka-1"), ("--app", "hello", "--dc", "osaka")):
        assert run(monkeypatch, Answer(ROW), *line) == 1
        assert capsys.readouterr().out.startswith("DC NODE APP")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("--dc", "nara"), "there is no data center nara, only tokyo, osaka"),
        (("--node", "nara"), "there is no node 'nara', only tokyo/tokyo-1, osaka/osaka-1"),
        (("--app", "nope"), "there is no app default/nope, only default/hello"),
        (("--dc", "fax"), "there is no data center fax"),
    ],
)
def test_what_is_not_there(
    monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...], words: str
) -> None:
    with pytest.raises(NotFound, match=words):
        run(monkeypatch, Answer(ROW), *argv)


@pytest.mark.parametrize("argv", [("auxw!",), ("-z",), ("--dc",), ("aux", "ay")])
def test_wrong_arguments(monkeypatch: pytest.MonkeyPatch, argv: tuple[str, ...]) -> None:
    with pytest.raises(UsageError, match=r"^ps: "):
        run(monkeypatch, Answer(), *argv)


def test_it_takes_the_rows_of_a_real_table() -> None:
    table = ProcessTable("tokyo/tokyo-1")
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
    assert set(ROW) <= set(rows[0])
    own = ps.select([row for row in rows if row["pid"] == os.getpid()])
    for columns in (ps.SHORT, ps.USER, ps.FULL):
        assert sys.executable in lines(*own, columns=columns)[1] or "pytest" in lines(*own)[1]


def test_it_starts_light() -> None:
    heavy = ("asyncio", "msgspec", "pydantic", "rich", "fastapi")
    program = (
        "import sys\nfrom tabane.tools.cli import ps\n"
        f"ps.render([{ROW!r}], ps.USER, 0.0, 80); ps.render([], ps.FULL, 0.0, None)\n"
        f"from tabane.clock import SYSTEM\nprint([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stderr
