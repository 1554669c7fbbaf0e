"""One shell's view of a pretended cluster, without any file system."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tabane.k2i.procfs import parse_stat, parse_status
from tabane.tools.procfs.numbers import FIRST
from tabane.tools.procfs.pretend import Pretend, Proc
from tabane.tools.procfs.source import parse_answer
from tabane.tools.procfs.users import FIRST as FIRST_USER
from tabane.tools.procfs.users import Owners
from tabane.tools.procfs.view import AGE_LIMIT_S, NodeLine, Remote, View

HZ = os.sysconf("SC_CLK_TCK")
HERE_S = 50_000.0
"""How long this machine is up."""
NS = 1_000_000_000


class Looker:
    """A view, and a clock for it."""

    def __init__(self, source: Pretend, boot_id: str = "here") -> None:
        names = {"root": 0, "alice": 1000}
        users, groups = (Owners(names.get, lambda n: n in names.values()) for _ in range(2))
        self.source = source
        self.view = View(users, groups, boot_id)
        self.now = 0.0

    def look(self, after_s: float = 1.0) -> View:
        self.now += after_s
        self.view.update(self.source.fetch(), self.now, int(self.now * NS), HERE_S + self.now)
        return self.view

    def pids(self) -> dict[tuple[str, int], int]:
        return {(r.key.node, r.key.pid): n for n, r in self.view.processes.items()}

    def one(self, node: str, pid: int) -> Remote:
        return self.view.processes[self.pids()[node, pid]]

    def uptime_s(self) -> float:
        text = self.view.host_file("uptime", HERE_S + self.now, 1000)
        return float(text.split()[0])

    def age_s(self, node: str, pid: int) -> float:
        """As ps reckons it."""
        stat = parse_stat(self.view.render(self.one(node, pid), "stat"))
        return self.uptime_s() - stat.starttime / HZ


@pytest.fixture
def looker() -> Looker:
    looker = Looker(Pretend({"tokyo/a": 3, "osaka/b": 3}))
    looker.look()
    return looker


def test_every_process_of_every_node_is_there(looker: Looker) -> None:
    assert list(looker.view.processes) == list(range(FIRST, FIRST + 6))
    assert set(looker.pids()) == {
        (node, pid) for node in ("tokyo/a", "osaka/b") for pid in (1, 2, 3)
    }


def test_numbers_stay_while_the_view_lives(looker: Looker) -> None:
    before = looker.pids()
    looker.source["tokyo/a"].add(Proc(9, start=900))
    del looker.source["osaka/b"].processes[2]
    looker.look()
    after = looker.pids()
    assert {key: after[key] for key in before if key in after} == {
        key: number for key, number in before.items() if key != ("osaka/b", 2)
    }
    assert after["tokyo/a", 9] == FIRST + 6


def test_a_pid_that_was_given_again_is_another_process(looker: Looker) -> None:
    before = looker.pids()["tokyo/a", 2]
    looker.source["tokyo/a"].add(Proc(2, start=5000))
    looker.look()
    assert looker.pids()["tokyo/a", 2] not in (before, None)
    assert looker.view.find(before) is None


def test_a_node_that_was_started_again_has_other_processes(looker: Looker) -> None:
    before = set(looker.view.processes)
    looker.source["tokyo/a"].incarnation = "second"
    looker.look()
    osaka = {number for (node, _), number in looker.pids().items() if node == "osaka/b"}
    assert before & set(looker.view.processes) == osaka


def test_a_silent_node_is_shown_no_longer_than_its_age_allows(looker: Looker) -> None:
    before = looker.pids()
    looker.source.silent.add("osaka/b")
    looker.look(AGE_LIMIT_S - 1)
    assert not looker.view.expire(looker.now)
    assert looker.pids() == before
    looker.look(2)
    assert looker.view.expire(looker.now)
    assert {node for node, _ in looker.pids()} == {"tokyo/a"}
    shown = {line.name: line.shown for line in looker.view.lines(looker.now)}
    assert shown == {"tokyo/a": True, "osaka/b": False}
    assert b"MemTotal:        8388608 kB" in looker.view.host_file("meminfo", 0, 0)
    looker.source.silent.clear()
    looker.look()
    assert looker.pids() == before, "it is back, with its numbers"


def test_a_node_that_was_silent_from_the_first_is_in_the_table() -> None:
    looker = Looker(Pretend({"tokyo/a": 3, "osaka/b": 3}))
    looker.source.silent.add("osaka/b")
    looker.look()
    assert looker.view.lines(looker.now)[1] == NodeLine("osaka/b", None, 0, False)
    looker.source.silent.clear()
    looker.look()
    assert [line.shown for line in looker.view.lines(looker.now)] == [True, True]


def test_parents_groups_and_sessions_are_mapped(looker: Looker) -> None:
    looker.source["osaka/b"].add(Proc(50, ppid=2, pgrp=3, session=2))
    looker.source["osaka/b"].add(Proc(51, ppid=0))
    looker.source["osaka/b"].add(Proc(52, ppid=777))
    view, pids = looker.look(), looker.pids()
    stat = parse_stat(view.render(looker.one("osaka/b", 50), "stat"))
    expected = (pids["osaka/b", 2], pids["osaka/b", 3], pids["osaka/b", 2])
    assert (stat.ppid, stat.pgrp, stat.session) == expected
    for pid in (51, 52):
        stat = parse_stat(view.render(looker.one("osaka/b", pid), "stat"))
        assert stat.ppid == 1, "whose parent is not there hangs from the shell's first process"


def test_a_group_keeps_its_number_when_its_leader_has_ended(looker: Looker) -> None:
    machine = looker.source["tokyo/a"]
    machine.add(Proc(50))
    machine.add(Proc(51, pgrp=50, session=50))
    looker.look()
    leader = looker.pids()["tokyo/a", 50]
    del machine.processes[50]
    for _ in range(3):
        looker.look()
        machine.processes[51].utime += 1
        found = looker.view.ids(looker.one("tokyo/a", 51))
        assert (found.pgrp, found.session) == (leader, leader)


def test_ages_are_right_whatever_the_machines_own_start() -> None:
    looker = Looker(Pretend({"tokyo/old": 2, "osaka/new": 2}))
    old, new = looker.source["tokyo/old"], looker.source["osaka/new"]
    old.uptime_s, new.uptime_s = 3 * HERE_S, 500.0
    old.processes[2].start, new.processes[2].start = 10 * HZ, 100 * HZ
    looker.look()
    assert looker.uptime_s() >= 3 * HERE_S, "no process may be older than the view's machine"
    assert looker.age_s("tokyo/old", 2) == pytest.approx(3 * HERE_S - 10, abs=0.05)
    assert looker.age_s("osaka/new", 2) == pytest.approx(400, abs=0.05)
    stat = looker.view.host_file("stat", HERE_S, 1_000_000).decode()
    assert f"btime {1_000_000 - round(2 * HERE_S - 1)}" in stat


def test_start_times_do_not_move(looker: Looker) -> None:
    before = looker.view.render(looker.one("tokyo/a", 2), "stat")
    for machine in looker.source.machines.values():
        machine.uptime_s += 1.37
    looker.look(1.0)
    looker.source["tokyo/a"].processes[2].utime += 5
    looker.look(1.0)
    after = looker.view.render(looker.one("tokyo/a", 2), "stat")
    assert parse_stat(before).starttime == parse_stat(after).starttime
    assert parse_stat(after).utime == 5


def test_nodes_of_this_machines_kernel_need_no_translation() -> None:
    looker = Looker(Pretend({"tokyo/a": 2}), boot_id="same")
    machine = looker.source["tokyo/a"]
    machine.boot_id, machine.uptime_s = "same", HERE_S + 0.3
    looker.look()
    assert parse_stat(looker.view.render(looker.one("tokyo/a", 2), "stat")).starttime == 102


def test_a_kernel_counts_once(looker: Looker) -> None:
    assert b"MemTotal:       16777216 kB" in looker.view.host_file("meminfo", 0, 0)
    for machine in looker.source.machines.values():
        machine.boot_id = "one"
    looker.look()
    assert b"MemTotal:        8388608 kB" in looker.view.host_file("meminfo", 0, 0)
    assert looker.view.host_file("loadavg", 0, 0).startswith(b"0.50 0.25 0.10 1/6 ")


def test_what_has_not_changed_stays_the_same_object(looker: Looker) -> None:
    before = looker.one("tokyo/a", 2), looker.one("tokyo/a", 3)
    looker.source["tokyo/a"].processes[3].utime += 1
    looker.look()
    after = looker.one("tokyo/a", 2), looker.one("tokyo/a", 3)
    assert after[0] is before[0]
    assert after[1] is not before[1]
    assert after[1].changed_ns > before[1].changed_ns


def test_users_have_the_names_they_have_there(looker: Looker) -> None:
    machine = looker.source["tokyo/a"]
    machine.users |= {1000: "bob", 1001: "alice"}
    machine.add(Proc(50, uid=1000))
    machine.add(Proc(51, uid=1001))
    view = looker.look()
    assert looker.one("tokyo/a", 50).uid == FIRST_USER
    assert looker.one("tokyo/a", 51).uid == 1000
    status = parse_status(view.render(looker.one("tokyo/a", 51), "status"))
    assert status[b"Uid"].split() == [b"1000"] * 4


def test_strange_bytes_pass(looker: Looker) -> None:
    name, words = b"a) R 1 (\n\xff\x1b[2J", b"x\n\x1b]0;title\x07\0\xff\0"
    looker.source["tokyo/a"].add(Proc(50, name=name, cmdline=words))
    view = looker.look()
    one = looker.one("tokyo/a", 50)
    assert view.render(one, "cmdline") == words
    assert view.render(one, "comm") == name + b"\n"
    assert b"(%b) S " % name in view.render(one, "stat")
    assert view.render(one, "environ") == b""


def test_an_answer_as_it_travels() -> None:
    """What a node's k2i writes is what the view reads."""
    import msgspec

    from tabane.k2i.raw import read_raw
    from tabane.k2i.service import Part, Question, render
    from tabane.k2i.table import ProcessTable
    from tabane.security.identity import Principal
    from tabane.tools.procfs.source import FILES

    table = ProcessTable("tokyo/a")
    try:
        processes = [p for p in table.processes() if p.pid == os.getpid()]
    finally:
        table.close()
    rows = read_raw(Path("/proc"), processes, FILES, Principal("peer", 0, 0))
    body = render(Question("raw", {}), [Part("tokyo/a", "first", 0.1, rows)], ["osaka/b"], 0.0)
    answer = parse_answer(body)
    assert answer.silent == ["osaka/b"]
    (told,) = answer.told
    assert (told.node, told.incarnation, told.age_s) == ("tokyo/a", "first", 0.1)
    (process,) = told.raw.processes
    assert process.files[FILES.index("cmdline")] == Path("/proc/self/cmdline").read_bytes()
    from tabane.errors import ProtocolError

    for wrong in (b"", b"<html>", body[:-1], msgspec.msgpack.encode({"nodes": []})):
        with pytest.raises(ProtocolError, match="of another version"):
            parse_answer(wrong)
