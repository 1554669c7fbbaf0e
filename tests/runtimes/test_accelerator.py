"""The verdict on this machine's processor: found out once, whoever asks."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path

import msgspec
import pytest
from msgspec.structs import replace

from tabane.errors import Unsupported
from tabane.runtimes.machines.kernel import GuestKernel
from tabane.runtimes.qemu import accelerator
from tabane.runtimes.qemu.accelerator import Verdict, find_accelerator
from tabane.runtimes.qemu.machine import Accelerator, Confinement

KERNEL = GuestKernel(Path("/k"), Path("/m"), "6.1")
PLACE = Confinement(Path("/c"), Path("/r"), "", "", 1, {})
PROBLEM = "a guest did not boot within 3 s"


class Machine:
    """Boots guests, or does not: `problems` by accelerator."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, **problems: str) -> None:
        self.trials: list[tuple[str, int, float]] = []
        self._problems = problems
        monkeypatch.setattr(accelerator, "_why_not", self._why_not)
        monkeypatch.setattr(accelerator, "_ticks_khz", self._ticks_khz)

    async def _why_not(
        self, tried: Accelerator, _: Confinement, place: Path, timeout_s: float
    ) -> str | None:
        assert place.is_dir()
        self.trials.append((tried.name, tried.ticks_khz, timeout_s))
        await asyncio.sleep(0)
        return self._problems.get(tried.name)

    async def _ticks_khz(self) -> int:
        return 2_000_000


async def find(kept: Path, kernel: GuestKernel = KERNEL) -> Accelerator:
    root = kept / f"root-{next(_numbers)}"
    return await find_accelerator(kernel, Path("/i"), replace(PLACE, root=root), kept)


_numbers = itertools.count()


async def test_a_kvm_that_boots_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    found = await find(tmp_path)
    assert (found.name, found.emulates) == ("kvm", False)
    assert machine.trials == [("kvm", 0, 3.0)]


async def test_one_that_does_not_is_emulated_and_the_reason_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, kvm=PROBLEM)
    found = await find(tmp_path)
    assert found == Accelerator("tcg", f"emulated, as {PROBLEM}", 2_000_000)
    assert [name for name, _, _ in machine.trials] == ["kvm", "tcg"]


async def test_all_nodes_of_a_machine_ask_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine = Machine(monkeypatch, kvm=PROBLEM)
    found = await asyncio.gather(*(find(tmp_path) for _ in range(3)))
    assert len(set(map(msgspec.json.encode, found))) == 1
    assert len(machine.trials) == 2
    await find(tmp_path)
    assert len(machine.trials) == 2


@pytest.mark.parametrize("stale", ["boot", "release", "broken"])
async def test_a_verdict_of_before_counts_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stale: str
) -> None:
    machine = Machine(monkeypatch)
    await find(tmp_path)
    file = tmp_path / "accelerator.json"
    if stale == "broken":
        file.write_bytes(file.read_bytes()[:-9])
    else:
        verdict = msgspec.json.decode(file.read_bytes(), type=Verdict)
        changed = msgspec.structs.replace(verdict, **{stale: "another"})
        file.write_bytes(msgspec.json.encode(changed))
    await find(tmp_path)
    assert len(machine.trials) == 2


async def test_where_nothing_boots_both_reasons_are_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Machine(monkeypatch, kvm="no KVM", tcg="no QEMU")
    with pytest.raises(Unsupported, match=r"boots no guest: no QEMU \(and with KVM: no KVM\)"):
        await find(tmp_path)
    assert not (tmp_path / "accelerator.json").exists()
    Machine(monkeypatch)
    assert (await find(tmp_path)).name == "kvm"


def script(*lines: str) -> tuple[str, ...]:
    return ("/bin/sh", "-c", "\n".join(lines))


async def test_a_boot_is_the_agents_first_word() -> None:
    word = f"echo {accelerator.GOOD_WORD.decode()} >&2"
    said = script("echo noise >&2", word, "exec sleep 99")
    assert await accelerator._boot(said, 9) is None


async def test_a_boot_that_ends_or_hangs_is_none() -> None:
    said = script("echo first >&2", "echo its last word >&2")
    assert await accelerator._boot(said, 9) == "a guest did not boot: its last word"
    assert await accelerator._boot(script("exit 1"), 9) == "a guest did not boot: it said nothing"
    hangs = script("exec sleep 99")
    assert await accelerator._boot(hangs, 0.05) == "a guest did not boot within 0.05 s"
