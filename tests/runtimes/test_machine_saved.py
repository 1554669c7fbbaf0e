"""What a checkpoint of a machine consists of, and what QEMU is told of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from msgspec.structs import replace

from tabane.errors import Corrupt
from tabane.runtimes.contents import write_contents
from tabane.runtimes.machines.saved import LAYER, MEMORY, STATE, Saved, read_saved
from tabane.runtimes.qemu.machine import MICROVM, Q35, Accelerator, Machine, Plan, make_argv

TCG = Accelerator("tcg", "told", 2_600_000)


def fill(directory: Path) -> None:
    for size, name in enumerate((MEMORY, STATE, LAYER), 10):
        (directory / name).write_bytes(bytes(size))


def test_none_of_its_files_may_be_missing(tmp_path: Path) -> None:
    whole = Saved(memory_bytes=144 << 20, ticks_khz=2_600_000)
    fill(tmp_path)
    write_contents(whole, tmp_path)
    assert read_saved(tmp_path) == replace(whole, sizes={MEMORY: 10, STATE: 11, LAYER: 12})
    for name in (MEMORY, STATE, LAYER):
        fill(tmp_path)
        (tmp_path / name).unlink()
        write_contents(whole, tmp_path)
        with pytest.raises(Corrupt, match=f"has nothing of {name}"):
            read_saved(tmp_path)


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
