"""Sums of host-wide files, read as tools read them."""

from __future__ import annotations

from pathlib import Path

from tabane.tools.procfs import totals


def test_memory_adds_up() -> None:
    one = b"MemTotal:       1000 kB\nHugePages_Total:       2\nHugepagesize:       2048 kB\n"
    other = b"MemTotal:       500 kB\nHugepagesize:       2048 kB\nZswap:   1 kB\n"
    lines = totals.sum_meminfo([one, other]).decode().splitlines()
    values = {line.split()[0]: line.split()[1:] for line in lines}
    assert values == {
        "MemTotal:": ["1500", "kB"],
        "HugePages_Total:": ["2"],
        "Hugepagesize:": ["2048", "kB"],
        "Zswap:": ["1", "kB"],
    }


def test_one_machines_files_stay_as_they_are() -> None:
    for name, add in (("meminfo", totals.sum_meminfo), ("vmstat", totals.sum_vmstat)):
        raw = Path("/proc", name).read_bytes()
        assert add([raw]).split() == raw.split()
    raw = Path("/proc/stat").read_bytes()
    btime = int(raw.partition(b"\nbtime ")[2].split()[0])
    assert sorted(totals.sum_stat([(raw, 100)], btime, 100).split(b"\n")) == sorted(
        raw.split(b"\n")
    )


def test_cpus_are_numbered_through() -> None:
    one = b"cpu  30 0\ncpu0 10 0\ncpu1 20 0\nctxt 5\nbtime 77\nintr 3 1 2\n"
    other = b"cpu  200 2\ncpu0 200 2\nctxt 6\nbtime 99\nintr 9 9\n"
    lines = totals.sum_stat([(one, 100), (other, 200)], 50, 100).decode().splitlines()
    assert lines[:4] == ["cpu  130 1", "cpu0 10 0", "cpu1 20 0", "cpu2 100 1"]
    assert set(lines[4:]) == {"ctxt 11", "btime 50", "intr 12 10 2"}


def test_load_and_idle() -> None:
    files = [b"0.50 0.25 0.10 1/600 4242\n", b"1.00 1.00 1.00 2/90 77\n"]
    assert totals.sum_loadavg(files, 1200, 4_200_000) == b"1.50 1.25 1.10 3/1200 4200000\n"
    assert totals.sum_idle([b"10.0 5.5\n", b"20.0 6.0\n"]) == 11.5
