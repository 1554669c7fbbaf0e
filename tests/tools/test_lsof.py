"""tabane lsof: which files, how they are shown; the oracle is this machine's own lsof."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tests.tools.conftest import EVIL, Pretended, Run, check_refusal
from tests.tools.rows import ROW
from tests.tools.test_hosts import HERE, answer, as_json

from tabane.k2i import ProcessTable
from tabane.k2i.files import read_files
from tabane.k2i.host import HostReader
from tabane.k2i.mounts import MountReader
from tabane.security.identity import Principal
from tabane.tools.cli import lsof, run

PROGRAM = """
import socket, sys
file = open(sys.argv[1])
tcp = socket.create_server(("127.0.0.1", 0))
udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind(("0.0.0.0", 0))
six = socket.create_server(("::1", 0), family=socket.AF_INET6)
client = socket.create_connection(tcp.getsockname())
server, _ = tcp.accept()
unix = socket.socket(socket.AF_UNIX)
unix.bind(sys.argv[1] + ".sock")
print(tcp.getsockname()[1], flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def opener(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[int, int, Path]]:
    """A process with files and sockets open: its pid, its TCP port, and its file."""
    path = tmp_path_factory.mktemp("lsof") / "an odd name"
    path.write_text("text")
    pipe = subprocess.PIPE
    argv = [sys.executable, "-c", PROGRAM, str(path)]
    with subprocess.Popen(argv, stdin=pipe, stdout=pipe) as child:
        assert child.stdout and child.stdin
        port = int(child.stdout.readline())
        yield child.pid, port, path
        child.stdin.close()
        child.wait()


@pytest.fixture(scope="module")
def rows(opener: tuple[int, int, Path]) -> list[dict[str, Any]]:
    table = ProcessTable("tokyo/tokyo-1", "i-1")
    own = [row for row in table.processes() if row.pid in (opener[0], os.getpid())]
    table.close()
    found: list[dict[str, Any]] = json.loads(
        msgspec.json.encode(read_files(Path("/proc"), own, Principal("token"), mapped=True))
    )
    return found


def chosen(rows: list[dict[str, Any]], argv: list[str]) -> list[dict[str, Any]]:
    args = lsof._parser().parse_args(argv)
    choices, exclusions = lsof.tests_of(args)
    return lsof.choose(rows, choices, exclusions, together=args.together)


QUESTIONS = [
    ["-p", "{pid}"],
    ["-a", "-p", "{pid}", "-i"],
    ["-a", "-p", "{pid}", "-i", "4"],
    ["-a", "-p{pid}", "-i6"],
    ["-a", "-p", "{pid}", "-iTCP", "-sTCP:LISTEN"],
    ["-a", "-p", "{pid}", "-i", ":{port}"],
    ["-a", "-p", "{pid}", "-i", "tcp@127.0.0.1:{port}"],
    ["-a", "-p", "{pid}", "-iUDP"],
    ["-a", "-p", "{pid}", "-U"],
    ["-a", "-p", "{pid}", "-d", "0-3"],
    ["-a", "-p", "{pid}", "-d", "cwd,txt"],
    ["-a", "-p", "{pid}", "-d", "^mem"],
    ["{path}"],
]


@pytest.mark.parametrize("question", QUESTIONS, ids=" ".join)
def test_lsof_finds_what_lsof_finds(
    question: list[str], rows: list[dict[str, Any]], opener: tuple[int, int, Path]
) -> None:
    """Descriptors, types, inodes and names (of unix sockets lsof's name says more)."""
    pid, port, path = opener
    argv = [word.format(pid=pid, port=port, path=path) for word in question]
    done = subprocess.run(["lsof", "-n", "-P", "-F", "ftin", *argv], capture_output=True, text=True)
    expected = set()
    for part in re.split(r"^f", done.stdout, flags=re.MULTILINE)[1:]:
        fd, *fields = part.splitlines()
        said = {line[0]: line[1:] for line in fields}
        name = said.get("n", "").split(" type=")[0]
        expected.add((fd, said.get("t", ""), "" if said.get("t") == "unix" else name))
    shown = set()
    for row in chosen(rows, argv):
        name = "" if row["type"] == "unix" else lsof.name_of(row)
        name = name.split(" (")[0] if "IP" in row["type"] else name
        shown.add((row["fd"], row["type"], name))
    assert len(shown) > 0

    def comparable(files: set[tuple[str, str, str]]) -> set[tuple[str, str, str]]:
        """Nameless ones are named differently: `pipe` here is `pipe:[17]` there."""
        named = {file for file in files if file[2].startswith("/") or "IP" in file[1]}
        return named | {(fd, kind, "") for fd, kind, _ in files - named}

    assert comparable(shown) == comparable(expected)


FILE = {"dc": "tokyo", "node": "tokyo-1", "app": "default/hello", "class": "container", "pid": 42}
FILE |= {"uid": 33, "user": "www-data", "name": "httpd", "fd": "3", "mode": "r", "type": "REG"}
FILE |= {"device": "8,1", "size": 12, "offset": 0, "inode": 77, "path": "/var/log/x", "state": ""}
FILE |= {"protocol": "", "local_address": "", "local_port": 0, "peer_address": "", "peer_port": 0}
SOCKET = FILE | {"fd": "4", "mode": "u", "type": "IPv6", "protocol": "TCP", "state": "ESTABLISHED"}
SOCKET |= {"local_address": "::1", "local_port": 80, "peer_address": "fe80::2", "peer_port": 5}
SOCKET |= {"device": "", "size": None, "pid": 43}


def test_lines(tabane: Run, pretended: Pretended) -> None:
    evil = FILE | {"path": EVIL, "app": "", "class": ""}
    pretended.begin(tokyo=answer("files", FILE, SOCKET, evil))
    lines = tabane("lsof").out.splitlines()
    heading, file, other, sock = (" ".join(line.split()) for line in lines)
    columns = "COMMAND PID USER FD TYPE DEVICE SIZE/OFF INODE NAME"
    assert heading == f"DC NODE APP CLASS {columns}"
    place = "tokyo tokyo-1 hello container httpd"
    assert file == f"{place} 42 www-data 3r REG 8,1 12 77 /var/log/x"
    name = "[::1]:80->[fe80::2]:5 (ESTABLISHED)"
    assert sock == f"{place} 43 www-data 4u IPv6 0t0 TCP {name}"
    assert "77 \\x1b[2J" in other
    assert tabane("lsof", "-t").out == "tokyo/tokyo-1:42\ntokyo/tokyo-1:43\n"
    assert tabane("lsof", "-i", ":9") == (1, "", "")
    assert len(json.loads(tabane("lsof", "--json", "-i").out)["files"]) == 1


@pytest.mark.parametrize(
    ("argv", "asked"),
    [
        ("", ""),
        ("-p 42", "&pid=42"),
        ("-p 43,42", "&pid=42,43"),
        ("-p tokyo/tokyo-1:42", ""),
        ("-p ^42", ""),
        ("-i :80", "&type=IPv4,IPv6"),
        ("-p 42 -i", ""),
        ("-a -p 43 -i", "&pid=43&type=IPv4,IPv6"),
        ("/var/log/x", "&path=/var/log/x"),
        ("-nP --app hello", "&app=default/hello"),
        ("-u root -c ht -U", ""),
    ],
)
def test_nodes_leave_out_what_they_can(
    argv: str, asked: str, tabane: Run, pretended: Pretended
) -> None:
    pretended.begin(tokyo=answer("files", FILE, SOCKET))
    assert tabane("lsof", *argv.split()).code == 0
    assert pretended.nodes["tokyo"].asked[0][0] == f"GET /v2/files?scope=cluster{asked}"


@pytest.mark.parametrize(
    ("argv", "found"),
    [
        ("-c htt", [42, 43]),
        ("-c /^HTT/i", [42, 43]),
        ("-c /^tt/", []),
        ("-u ^www-data", []),
        ("-u 33", [42, 43]),
        ("-p ^42", [43]),
        ("-p tokyo/tokyo-1:43", [43]),
        ("-i TCP -u nobody", [43]),
        ("-a -i TCP -u nobody", []),
        ("-i -sTCP:^ESTABLISHED", []),
    ],
)
def test_choices(argv: str, found: list[int]) -> None:
    assert [row["pid"] for row in chosen([SOCKET, FILE], argv.split())] == found


def test_a_newline_hides_no_name() -> None:
    assert chosen([FILE | {"name": "ht\ntpd"}], ["-c", "/^h.*d$/"])


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ("-p x", "-p: 'x' is no process"),
        ("-i http://x", "is no address"),
        ("-i :99999", "'99999' is neither a port up to 65535 nor a service's name"),
        ("-i :no-such-service", "'no-such-service' is neither a port"),
        ("-i :80-", "'' is neither a port"),
        ("-i :1-2-3", "'2-3' is neither a port"),
        ("-p ,", "an empty list names nobody"),
        ("-d 0-", "-d: '0-' is no range of descriptors"),
        ("-d 9-1", "-d: '9-1' is no range of descriptors"),
        ("+D /tmp", "'+D' is neither an option here nor a file"),
        ("-s LISTEN", "write a protocol and states"),
        ("-c /(/", "is no regular expression"),
    ],
)
def test_what_is_not_understood(argv: str, said: str, tabane: Run) -> None:
    check_refusal(tabane("lsof", *argv.split()), 2, "lsof: ", said)


def test_many_processes_are_chosen_here(tabane: Run, pretended: Pretended) -> None:
    pretended.begin(tokyo=answer("files", FILE, SOCKET))
    many = ",".join(map(str, range(3000)))
    assert tabane("lsof", "-t", "-p", many).code == 0
    assert pretended.nodes["tokyo"].asked[0][0] == "GET /v2/files?scope=cluster"


def test_a_port_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getservbyname", {"web": SOCKET["local_port"]}.__getitem__)
    assert chosen([SOCKET, FILE], ["-i", ":web"]) == [SOCKET]


def test_a_port_that_is_in_use(rows: list[dict[str, Any]], opener: tuple[int, int, Path]) -> None:
    """The commonest question of all."""
    _, port, _ = opener
    with socket.create_connection(("127.0.0.1", port)):
        pass
    listening = chosen(rows, ["-i", f"tcp:{port}", "-s", "TCP:LISTEN"])
    assert [row["pid"] for row in listening] == [opener[0]]


@pytest.mark.parametrize("line", ["free", "uptime", "vmstat", "df", "ps", "pstree", "lsof"])
def test_who_is_silent_is_said_after_what_the_others_said(
    line: str, pretended: Pretended, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: dict[str, list[Any]] = {
        "processes": [ROW],
        "files": [FILE],
        "mounts": [as_json(row) for row in MountReader(HERE).read()],
        "host": [as_json(HostReader(HERE).read()) | {"users": 2}],
    }
    kinds = {"df": "mounts", "ps": "processes", "pstree": "processes", "lsof": "files"}
    kind = kinds.get(line, "host")
    pretended.begin(tokyo=answer(kind, *rows[kind], silent=("nara/nara-1",)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TABANE_ROOT", str(pretended.root))
        patch.setattr("sys.stderr", sys.stdout)
        assert run([line]) == 1
    *shown, last = capsys.readouterr().out.splitlines()
    assert last == "tabane: no answer from nara/nara-1"
    assert shown and "nara" not in "".join(shown)
