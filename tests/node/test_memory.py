"""What of the machine's memory is a node's."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabane.k2i.host import HostReader
from tabane.node import memory
from tabane.node.memory import FRESH_S, NodeMemory
from tabane.node.pressure import Memory
from tabane.runtimes.cgroups import MemoryUse
from tabane.testing import VirtualClock

MIB = 1 << 20
KIB = 1 << 10


class Machine:
    """A procfs that a test writes, and what the node's instances hold."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.clock = VirtualClock()
        self.held_mib = 0
        (directory / "pressure").mkdir()
        self.write(available_mib=600)

    def write(self, *, available_mib: int, stalled: float | None = None) -> None:
        sizes = {"MemTotal": 1000, "MemFree": 1, "MemAvailable": available_mib, "SwapFree": 50}
        lines = (f"{name}: {size * KIB} kB\n" for name, size in sizes.items())
        (self.directory / "meminfo").write_text("".join(lines))
        if stalled is not None:
            times = "avg60=0.00 avg300=0.00 total=0\n"
            some, full = f"some avg10=99.00 {times}", f"full avg10={stalled:.2f} {times}"
            (self.directory / "pressure" / "memory").write_text(some + full)

    def node(self, limit_mib: int = 0) -> NodeMemory:
        reader = HostReader(root=self.directory, clock=self.clock)
        return NodeMemory(reader, "/tabane/c/n", limit_mib * MIB, self.clock)


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(tmp_path)

    class Cgroup:
        def __init__(self, path: str) -> None:
            assert path == "/tabane/c/n"

        def memory_use(self) -> MemoryUse:
            return MemoryUse(made.held_mib * MIB, 0)

    monkeypatch.setattr(memory, "Cgroup", Cgroup)
    return made


def mib(told: Memory) -> tuple[int, int, int]:
    return told.capacity_bytes // MIB, told.available_bytes // MIB, told.swap_bytes // MIB


def test_it_is_the_machines(machine: Machine) -> None:
    assert mib(machine.node().read()) == (1000, 600, 50)


def test_of_a_given_size_it_is_what_instances_have_left(machine: Machine) -> None:
    machine.held_mib = 120
    assert mib(machine.node(limit_mib=400).read()) == (400, 280, 50)
    machine.held_mib = 500
    assert mib(machine.node(limit_mib=400).read()) == (400, 0, 50)


def test_a_size_is_no_promise_of_what_the_machine_has_not(machine: Machine) -> None:
    assert mib(machine.node(limit_mib=5000).read()) == (1000, 600, 50)


def test_it_is_read_once_for_a_wake_and_again_for_the_next(machine: Machine) -> None:
    node = machine.node()
    node.read()
    machine.write(available_mib=300)
    assert mib(node.read())[1] == 600
    machine.clock.advance(FRESH_S)
    assert mib(node.read())[1] == 300


def test_stalls_are_those_of_all_that_could_run(machine: Machine) -> None:
    assert machine.node().stalled_percent() == 0.0
    machine.write(available_mib=600, stalled=12.5)
    assert machine.node().stalled_percent() == 12.5
