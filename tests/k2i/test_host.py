"""The machine's figures against what the kernel and other programs say of the same machine."""

from __future__ import annotations

import os
import socket
import subprocess
from pathlib import Path

import pytest

from tabane.k2i import host
from tabane.k2i.host import Cpu, HostReader, Place, use_between
from tabane.testing.clock import VirtualClock

ZERO = Cpu(*[0.0] * 10)


def test_the_figures_are_the_kernels() -> None:
    found = HostReader(Place("tokyo", "tokyo-1", "life")).read()
    assert (found.dc, found.node, found.incarnation) == ("tokyo", "tokyo-1", "life")
    assert found.hostname == socket.gethostname()
    assert found.cpus == len(found.each_cpu) == os.cpu_count()
    uptime_s = float(Path("/proc/uptime").read_text().split()[0])
    assert uptime_s - 60 < found.uptime_s <= uptime_s
    assert abs(found.wall - found.booted_at - found.uptime_s) < 2
    total = sum(getattr(found.cpu, name) for name in Cpu.__struct_fields__[:8])
    assert 0.8 < total / (found.uptime_s * found.cpus) < 1.2
    assert found.memory.total_kib == found.meminfo["MemTotal"]
    assert found.threads > found.runnable >= 1
    assert found.procs_running >= 1
    assert found.forks > 0
    assert found.interrupts > 0
    assert {"pswpin", "pswpout", "pgpgin", "pgpgout"} <= found.vmstat.keys()
    assert any(interface.name == "lo" for interface in found.interfaces)


def test_memory_is_what_free_shows() -> None:
    """Its `used`, and others, move on between the two."""
    words = subprocess.run(["free", "-k", "-w"], capture_output=True, text=True).stdout.split()
    at = words.index("Mem:")
    total, used, free, shared, buffers, cache, available = map(int, words[at + 1 : at + 8])
    found = HostReader().read().memory
    assert found.total_kib == total
    for mine, theirs in (
        (found.free_kib, free),
        (found.shared_kib, shared),
        (found.buffers_kib, buffers),
        (found.cache_kib, cache),
        (found.available_kib, available),
    ):
        assert abs(mine - theirs) < total // 20
    assert found.used_kib == found.total_kib - found.available_kib
    assert used > 0


def test_the_use_of_the_cpus_is_reckoned_over_half_a_second_at_least(tmp_path: Path) -> None:
    clock = VirtualClock()
    proc = make_proc(tmp_path, "cpu  100 0 0 100 0 0 0 0 0 0\ncpu0 100 0 0 100 0 0 0 0 0 0\n")
    reader = HostReader(root=proc, clock=clock)
    assert reader.read().cpu_use is None
    make_proc(tmp_path, "cpu  175 0 0 125 0 0 0 0 0 0\ncpu0 175 0 0 125 0 0 0 0 0 0\n")
    clock.advance(0.4)
    assert reader.read().cpu_use is None
    clock.advance(0.6)
    use = reader.read().cpu_use
    assert use is not None
    assert (use.user, use.idle, use.over_s) == (75.0, 25.0, 1.0)


def make_proc(directory: Path, stat: str) -> Path:
    rest = "intr 5 0\nctxt 6\nbtime 7\nprocesses 8\nprocs_running 9\nprocs_blocked 10\n"
    (directory / "stat").write_text(stat + rest)
    for name in ("uptime", "loadavg", "meminfo", "vmstat", "diskstats", "net/dev"):
        (directory / name).parent.mkdir(exist_ok=True)
        (directory / name).write_bytes(Path("/proc", name).read_bytes())
    (directory / "sys/kernel/random").mkdir(parents=True, exist_ok=True)
    (directory / "sys/kernel/random/boot_id").write_text("an-id\n")
    return directory


def test_a_machine_without_pressure_figures_has_none(tmp_path: Path) -> None:
    proc = make_proc(tmp_path, "cpu  1 1 1 1\ncpu0 1 1 1 1\n")
    found = HostReader(root=proc).read()
    assert found.pressure == {}
    assert (found.interrupts, found.context_switches, found.booted_at) == (5, 6, 7.0)
    assert found.cpu.steal_s == 0.0  # an old kernel has fewer columns


def test_pressure() -> None:
    text = (
        "some avg10=0.55 avg60=1.75 avg300=5.44 total=99\n"
        "full avg10=1.00 avg60=2.00 avg300=3.00 total=7\n"
    )
    found = host.parse_pressure(text)
    assert found is not None
    assert (found.some.avg10, found.some.total_us) == (0.55, 99)
    assert found.full is not None
    assert found.full.avg300 == 3.0
    alone = host.parse_pressure(text.splitlines()[0])
    assert alone is not None
    assert alone.full is None
    assert host.parse_pressure("") is None


def test_idle_time_that_goes_back_counts_as_nothing() -> None:
    before = Cpu(0, 0, 0, 10.0, 0, 0, 0, 0, 0, 0)
    after = Cpu(1.0, 0, 0, 9.9, 0, 0, 0, 0, 0, 0)
    use = use_between(before, after, 1.0)
    assert (use.user, use.idle) == (100.0, 0.0)
    assert use_between(ZERO, ZERO, 1.0).user == 0.0


def test_disks_that_were_used() -> None:
    lines = ("7 0 loop0 " + "0 " * 17, "254 0 vda 3 1 90 10 2 5 28 25 1 110 134 5 4 2 4 5 4")
    (disk,) = host.parse_disks("\n".join(lines))
    assert (disk.name, disk.reads, disk.written_sectors, disk.in_flight) == ("vda", 3, 28, 1)


@pytest.mark.parametrize("name", ["eth0", "veth1@a", "a:b"])
def test_interfaces(name: str) -> None:
    row = f"  {name}: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16"
    (found,) = host.parse_interfaces(f"Inter-|\n face |\n{row}\n")
    assert (found.name, found.rx_bytes, found.rx_dropped) == (name, 1, 4)
    assert (found.tx_bytes, found.tx_packets, found.tx_dropped) == (9, 10, 12)
