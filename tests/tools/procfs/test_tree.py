"""The files of the merged /proc, asked for as the kernel asks."""

from __future__ import annotations

import errno
import os
import stat as mode_of
import struct
from collections.abc import Iterator

import pytest

from tabane.k2i.procfs import parse_stat
from tabane.tools.procfs import wire
from tabane.tools.procfs.local import Local
from tabane.tools.procfs.numbers import FIRST
from tabane.tools.procfs.pretend import Pretend, Proc
from tabane.tools.procfs.tree import PROCESS_NAMES, Tree
from tabane.tools.procfs.users import local_groups, local_users
from tabane.tools.procfs.view import AGE_LIMIT_S, View
from tabane.tools.procfs.wire import Attributes

NAMES = ["self", "thread-self", "cpuinfo", "sys", "stat", "uptime"]


@pytest.fixture
def source() -> Pretend:
    source = Pretend({"tokyo/a": 3})
    source["tokyo/a"].users[77_000] = "noneofours"
    source["tokyo/a"].add(Proc(9, name=b"odd\n(\xff", uid=77_000))
    return source


@pytest.fixture
def tree(source: Pretend) -> Iterator[Tree]:
    users, groups = local_users(), local_groups()
    view = View(users, groups)
    view.update(source.fetch(), 0.0, 0, 20_000.0)
    fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    yield Tree(view, Local(fd), NAMES, secret=True, databases=(users, groups))
    os.close(fd)


def walk(tree: Tree, path: str) -> Attributes:
    found = tree.attributes(wire.ROOT)
    for name in path.split("/"):
        found = tree.look_up(found.node, name)
        assert tree.attributes(found.node)[:2] == found[:2]
    return found


def names_of(tree: Tree, path: str = "") -> list[bytes]:
    """As the kernel reads a listing, in small pieces."""
    listed = tree.listing(walk(tree, path).node if path else wire.ROOT)
    names: list[bytes] = []
    offset = 0
    while part := listed.part(offset, 500):
        while part:
            size, kind = struct.unpack_from("<II", part, 128 + 16)
            (offset,) = struct.unpack_from("<Q", part, 128 + 8)
            assert kind in (4, 8, 10)
            names.append(part[152 : 152 + size])
            part = part[152 + size + -(152 + size) % 8 :]
    return names


def test_the_root_lists_both_worlds(tree: Tree) -> None:
    names = names_of(tree)
    assert len(names) == len(set(names))
    assert {b"self", b"cpuinfo", b"stat", b"meminfo", b"tabane"} <= set(names)
    assert {b"%d" % number for number in range(FIRST, FIRST + 4)} <= set(names)
    assert b"%d" % os.getpid() in names


def test_files_of_another_nodes_process(tree: Tree) -> None:
    names = names_of(tree, str(FIRST + 3))
    assert names == [name.encode() for name in (*PROCESS_NAMES, "task")]
    stat = walk(tree, f"{FIRST + 3}/stat")
    content = tree.read(stat.node)
    assert (stat.mode, stat.size) == (mode_of.S_IFREG | 0o444, len(content))
    assert content.startswith(b"%d (odd\n(\xff) S " % (FIRST + 3))
    assert tree.read(walk(tree, f"{FIRST + 3}/comm").node) == b"odd\n(\xff\n"
    thread = walk(tree, f"{FIRST + 3}/task/{FIRST + 3}/stat")
    assert tree.read(thread.node) == content
    assert thread.node != stat.node


def test_who_owns_it_and_who_may_read_it(tree: Tree) -> None:
    directory, arguments = walk(tree, str(FIRST + 3)), walk(tree, f"{FIRST + 3}/cmdline")
    assert directory.uid == arguments.uid == 4_100_000_000
    assert mode_of.S_IMODE(arguments.mode) == 0o400, "for its owner and root"
    assert walk(tree, f"{FIRST}/cmdline").uid == 0


@pytest.mark.parametrize("name", ["maps", "mem", "io"])
def test_what_only_its_node_knows_is_refused(tree: Tree, name: str) -> None:
    found = walk(tree, f"{FIRST}/{name}")
    assert found.size, "the kernel asks only then"
    with pytest.raises(PermissionError):
        tree.read(found.node)


@pytest.mark.parametrize("name", ["exe", "cwd", "root"])
def test_links_of_another_node_lead_nowhere(tree: Tree, name: str) -> None:
    found = walk(tree, f"{FIRST}/{name}")
    assert mode_of.S_ISLNK(found.mode)
    with pytest.raises(PermissionError):
        tree.read_link(found.node, 0)


@pytest.mark.parametrize("name", ["fd", "ns"])
def test_open_files_of_another_node_are_not_listed(tree: Tree, name: str) -> None:
    with pytest.raises(PermissionError):
        tree.listing(walk(tree, f"{FIRST}/{name}").node)


@pytest.mark.parametrize(
    "path",
    [
        *(
            "nothing",
            "0",
            "01",
            "-1",
            "4194304",
            str(FIRST + 99),
            str(2**63),
            "²",
            "tabane/nothing",
        ),
        *(f"{FIRST}/nothing", f"{FIRST}/task/1", f"{FIRST}/task/{FIRST}/task", "tabane/local/self"),
    ],
)
def test_what_is_not_there(tree: Tree, path: str) -> None:
    with pytest.raises((FileNotFoundError, ProcessLookupError)):
        walk(tree, path)


def test_which_files_a_process_has_never_changes_but_what_they_are(tree: Tree) -> None:
    def told(name: bytes) -> tuple[int, ...]:
        """The file's number, and for how many seconds name and attributes are good."""
        node, _, name_s, attributes_s = struct.unpack_from("<4Q", tree.entry(FIRST << 8, name))
        return node, name_s, attributes_s

    assert told(b"ctty")[:2] == (0, wire.FOREVER_S)
    assert told(b"stat") == (walk(tree, f"{FIRST}/stat").node, wire.FOREVER_S, AGE_LIMIT_S)
    assert told(b"maps")[1:] == (wire.FOREVER_S, AGE_LIMIT_S)
    assert told(b"environ")[1:] == (wire.FOREVER_S, wire.FOREVER_S), "it is empty for ever"


def test_own_processes_are_links_into_the_real_procfs(tree: Tree) -> None:
    pid = os.getpid()
    assert mode_of.S_ISDIR(walk(tree, str(pid)).mode)
    link = walk(tree, f"{pid}/maps")
    assert mode_of.S_ISLNK(link.mode)
    assert tree.read_link(link.node, 0) == f"../tabane/local/{pid}/maps".encode()
    program = walk(tree, f"{pid}/exe").node
    assert tree.read_link(program, 0).decode() == os.readlink(f"/proc/{pid}/exe")  # noqa: PTH115
    with pytest.raises(PermissionError):
        tree.read_link(program, 4_000_000)
    assert tree.read_link(walk(tree, "self").node, 0) == b"tabane/local/self"
    assert set(names_of(tree, str(pid))) == {os.fsencode(n) for n in os.listdir(f"/proc/{pid}")}  # noqa: PTH208


def test_own_start_times_in_a_view_that_is_older_than_this_machine(source: Pretend) -> None:
    view = View(local_users(), local_groups())
    source["tokyo/a"].uptime_s = 5000.0
    view.update(source.fetch(), 0.0, 0, 1000.0)
    fd = os.open("/proc", os.O_RDONLY | os.O_DIRECTORY)
    tree = Tree(view, Local(fd), NAMES, secret=False)
    own = walk(tree, f"{os.getpid()}/stat")
    real = parse_stat(tree.local.read(os.getpid(), "stat")).starttime
    assert parse_stat(tree.read(own.node)).starttime == real + 4000 * os.sysconf("SC_CLK_TCK")
    os.close(fd)


def test_databases_name_those_who_are_unknown_here(tree: Tree) -> None:
    assert tree.overlays() == [("/proc/tabane/passwd", "/etc/passwd")]
    lines = tree.read(walk(tree, "tabane/passwd").node).decode().splitlines()
    assert lines[-1].startswith("noneofours:x:4100000000:4100000000:")
    assert any(line.startswith("root:x:0:") for line in lines)


def test_which_requests_want_fresh_data(tree: Tree) -> None:
    def about(opcode: int, node: int, name: bytes = b"") -> bool:
        return tree.is_about_nodes(wire.Request(opcode, 1, node, 0, 0, 0, name + b"\0"))

    assert about(wire.OPENDIR, wire.ROOT)
    assert about(wire.LOOKUP, wire.ROOT, b"%d" % FIRST)
    assert about(wire.LOOKUP, wire.ROOT, b"meminfo")
    assert about(wire.LOOKUP, FIRST << 8, b"stat")
    assert about(wire.GETATTR, (FIRST << 8) + 1)
    assert not about(wire.READ, (FIRST << 8) + 1), "its attributes were asked for just before"
    assert not about(wire.LOOKUP, wire.ROOT, b"self"), "every program that starts would wait"
    assert not about(wire.GETATTR, wire.ROOT)
    assert not about(wire.LOOKUP, wire.ROOT, b"1")
    assert not about(wire.GETATTR, os.getpid() << 8)


def test_the_protocol() -> None:
    request = struct.pack("<IIQQIIIHH", 46, wire.LOOKUP, 7, 1, 1000, 50, 99, 0, 0) + b"stat\0\0"
    parsed = wire.parse_request(request)
    assert (parsed.opcode, parsed.unique, parsed.node, parsed.uid) == (wire.LOOKUP, 7, 1, 1000)
    assert parsed.name == b"stat"
    assert wire.encode_error(7, errno.ENOENT) == struct.pack("<IiQ", 16, -2, 7)
    old = struct.pack("<IIII", 7, 30, 0, 0xFFFFFFFF)
    refused = wire.encode_init(parsed._replace(opcode=wire.INIT, body=old))
    assert struct.unpack_from("<Ii", refused) == (16, -errno.EPROTO)
    new = struct.pack("<IIII", 7, 40, 65536, 1 << 12)
    agreed = wire.encode_init(parsed._replace(opcode=wire.INIT, body=new))
    assert struct.unpack_from("<IiQIIII", agreed) == (80, 0, 7, 7, 31, 65536, 1 << 12)
    assert len(wire.encode_entry(Attributes(1, 0))) == 128
    assert len(wire.encode_attributes(Attributes(1, 0))) == 104
    assert len(wire.encode_statfs()) == 80
    assert len(wire.encode_listed(1, b"4194305", Attributes(1, 0))) == 160


def test_the_kernel_is_told_of_what_it_knows_and_has_changed(source: Pretend) -> None:
    view = View(local_users(), local_groups())
    view.update(source.fetch(), 0.0, 0, 20_000.0)
    tree = Tree(view, Local(), NAMES, secret=False)
    for name in (b"stat", b"cmdline", b"nothing"):
        tree.entry(FIRST << 8, name)
    tree.entry((FIRST + 1) << 8, b"stat")
    stat, other = walk(tree, f"{FIRST}/stat").node, walk(tree, f"{FIRST + 1}/stat").node

    def change(pid: int) -> list[int]:
        source["tokyo/a"].processes[pid].utime += 1
        changes = view.update(source.fetch(), 1.0, 1, 20_001.0)
        return [node for change in changes for node in tree.changed_files(change)]

    assert view.update(source.fetch(), 1.0, 1, 20_001.0) == []
    assert change(1) == [stat], "not the command line, which is as it was, nor what was never read"
    assert change(1) == [stat], "it is still known after a change"
    assert change(2) == [other]
    assert change(3) == []
    source["tokyo/a"].processes[1].uid = 5
    assert sorted(change(1)) == sorted((FIRST << 8) + n for n in (1, 4)), "all are another's"
