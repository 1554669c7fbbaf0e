"""What a checkpoint of a machine consists of, and what QEMU is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tabane.errors import Corrupt
from tabane.runtimes.machines.saved import LAYER, MEMORY, RECORD, STATE, read_record, write_record
from tabane.runtimes.qemu.machine import MICROVM, Q35, Accelerator, Machine, Plan, make_argv

TCG = Accelerator("tcg", "told", 2_600_000)


def fill(directory: Path) -> None:
    for size, name in enumerate((MEMORY, STATE, LAYER), 10):
        (directory / name).write_bytes(bytes(size))


def test_a_record_comes_back(tmp_path: Path) -> None:
    fill(tmp_path)
    write_record(tmp_path, 144 << 20, 2_600_000)
    saved = read_record(tmp_path)
    assert (saved.memory_bytes, saved.ticks_khz) == (144 << 20, 2_600_000)
    assert saved.sizes == {MEMORY: 10, STATE: 11, LAYER: 12}


@pytest.mark.parametrize("name", [MEMORY, STATE, LAYER])
def test_what_is_not_whole_is_refused(tmp_path: Path, name: str) -> None:
    fill(tmp_path)
    write_record(tmp_path, 144 << 20, 0)
    (tmp_path / name).write_bytes(b"cut")
    with pytest.raises(Corrupt, match=f"has 3 bytes of {name}, which has 1[012] bytes"):
        read_record(tmp_path)
    (tmp_path / name).unlink()
    with pytest.raises(Corrupt, match=f"has nothing of {name}, which has 1[012] bytes"):
        read_record(tmp_path)


def test_a_record_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Corrupt, match="no whole checkpoint of a machine"):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text('{"memory_bytes": 1, "ticks_khz": 0, "sizes": {}, "format": 2}')
    with pytest.raises(Corrupt, match="a checkpoint of format 2, not 1"):
        read_record(tmp_path)
    (tmp_path / RECORD).write_text('{"memory_bytes": 1, "ticks_khz": 0, "sizes": {}}')
    with pytest.raises(Corrupt, match="has nothing of memory"):
        read_record(tmp_path)


@pytest.mark.parametrize("machine", [MICROVM, Q35], ids=lambda machine: machine.name)
def test_one_that_goes_on_differs_in_its_memory_alone(machine: Machine) -> None:
    """Any other difference, QEMU would take for another machine."""
    fresh = make_argv(machine, Plan(144 << 20, 1, "02:7a:b0:01:00:01"), TCG)
    saved = make_argv(machine, Plan(144 << 20, 1, "02:7a:b0:01:00:01", is_saved=True), TCG)
    assert saved[-2:] == ("-incoming", "defer")
    differing = [pair for pair in zip(fresh, saved[:-2], strict=True) if pair[0] != pair[1]]
    assert differing == [
        (
            "memory-backend-memfd,id=memory,size=144M,share=on",
            "memory-backend-file,mem-path=/vm/memory,id=memory,size=144M,share=on",
        )
    ]
