"""Ten minutes of a machine in little memory."""

from __future__ import annotations

import os
from typing import Any

import pytest
from msgspec.structs import replace

from tabane.k2i import Process, ProcessTable
from tabane.k2i.history import FULL_S, KEEP_S, History
from tabane.k2i.host import Host, HostReader, Place

PLACE = Place("tokyo", "tokyo-1", "life")


@pytest.fixture(scope="module")
def host() -> Host:
    return HostReader(PLACE).read()


@pytest.fixture(scope="module")
def process() -> Process:
    table = ProcessTable("tokyo/tokyo-1", "life")
    try:
        return next(row for row in table.processes() if row.pid == os.getpid())
    finally:
        table.close()


def test_the_machines_rates_are_over_the_time_between_two_samples(host: Host) -> None:
    history = History(PLACE)
    later = replace(
        host,
        cpu=replace(host.cpu, user_s=host.cpu.user_s + 3, idle_s=host.cpu.idle_s + 1),
        forks=host.forks + 20,
        interfaces=[replace(i, rx_bytes=i.rx_bytes + 4096) for i in host.interfaces],
    )
    history.add(100.0, host, [])
    assert history.host(100.0) == []
    history.add(102.0, later, [])
    (point,) = history.host(103.5)
    assert (point.dc, point.node, point.incarnation) == PLACE
    assert (point.age_s, point.over_s) == (1.5, 2.0)
    assert (point.cpu_user, point.cpu_idle) == (75.0, 25.0)
    assert point.forks_per_s == 10.0
    others = sum(i.name != "lo" for i in host.interfaces)
    assert point.received_kib_per_s == 2.0 * others


def test_apps_and_processes_over_time(host: Host, process: Process) -> None:
    history = History(PLACE)
    web = replace(process, app="default/web", pid=10, start_ticks=5, cpu_s=1.0, rss_kib=100)
    other = replace(web, pid=11, start_ticks=6, rss_kib=50)
    system = replace(web, app="", pid=12, start_ticks=7)
    history.add(0.0, host, [web, other, system])
    busy = replace(web, cpu_s=1.5)
    history.add(1.0, host, [busy, other, system])
    history.add(2.0, host, [busy, system])  # the other is gone
    found = history.apps(2.0, apps={"default/web"})
    assert [(p.age_s, p.processes, p.cpu_percent, p.rss_kib) for p in found] == [
        (1.0, 2, 50.0, 150),
        (0.0, 1, 0.0, 100),
    ]
    points = history.processes(2.0, {10, 11})
    assert [(p.age_s, p.pid, p.cpu_percent, p.rss_kib) for p in points] == [
        (1.0, 10, 50.0, 100),
        (1.0, 11, 0.0, 50),
        (0.0, 10, 0.0, 100),
    ]
    assert {p.name for p in points} == {process.name}
    assert history.processes(2.0, {10}, since_s=0.5) == points[2:]


def test_a_pid_given_to_another_process_is_another(host: Host, process: Process) -> None:
    history = History(PLACE)
    first = replace(process, pid=10, start_ticks=5, cpu_s=9.0, name="first")
    second = replace(first, start_ticks=50, cpu_s=0.25, name="second")
    for at, row in ((0.0, first), (1.0, first), (2.0, second)):
        history.add(at, host, [row])
    points = history.processes(2.0, {10})
    assert [(p.name, p.start_ticks, p.cpu_percent) for p in points] == [
        ("first", 5, 0.0),
        ("second", 50, 25.0),
    ]


def run(history: History, host: Host, rows: list[Process], seconds: int) -> None:
    for at in range(seconds):
        history.add(float(at), host, rows)


def test_ten_minutes_are_kept_and_no_more(host: Host, process: Process) -> None:
    history = History(PLACE)
    run(history, host, [process], 900)
    points = history.host(899.0)
    assert (points[0].age_s, points[-1].age_s) == (KEEP_S, 0.0)
    ages = [p.age_s for p in history.processes(899.0, {process.pid})]
    assert ages[0] > KEEP_S - FULL_S
    assert ages[-1] == 0.0


def test_idle_processes_cost_nothing_between_full_blocks(host: Host, process: Process) -> None:
    history = History(PLACE)
    rows = [replace(process, pid=n) for n in range(1, 1001)]
    run(history, host, rows, 600)
    full = 600 / FULL_S + 1
    assert history.size_bytes < full * len(rows) * 300 + 600 * 400


def test_the_oldest_goes_before_too_much_is_kept(host: Host, process: Process) -> None:
    most = 1 << 20
    history = History(PLACE, most_bytes=most)
    for at in range(300):
        rows: list[Any] = [
            replace(process, pid=n, start_ticks=at // 5 + 1, cpu_s=float(at)) for n in range(500)
        ]
        history.add(float(at), host, rows)
        assert history.size_bytes <= most or len(history.host(float(at))) == 1
    assert 0 < len(history.host(299.0)) < 300
    assert history.host(299.0)[-1].age_s == 0.0
