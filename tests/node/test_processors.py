from __future__ import annotations

from pathlib import Path

import pytest

from tabane.node.processors import WINDOW_S, Processors
from tabane.testing import VirtualClock


def stat(user: int, idle: int, iowait: int = 0) -> str:
    return f"cpu  {user} 0 100 {idle} {iowait} 0 0 0 0 0\ncpu0 1 2 3\nintr 0\n"


def test_they_are_busy_when_next_to_nothing_was_idle_since_the_last_look(tmp_path: Path) -> None:
    clock, path = VirtualClock(), tmp_path / "stat"
    processors = Processors(clock, path)
    seen = []
    for user, idle, iowait in ((0, 9_000, 0), (20, 9_000, 0), (39, 9_000, 1), (49, 9_005, 6)):
        path.write_text(stat(user, idle, iowait))
        clock.advance(WINDOW_S)
        seen.append(processors.are_busy())
    assert seen == [False, True, True, False]


def test_it_looks_once_in_a_while(tmp_path: Path) -> None:
    clock, path = VirtualClock(), tmp_path / "stat"
    processors = Processors(clock, path)
    path.write_text(stat(0, 9_000))
    assert not processors.are_busy()
    path.write_text(stat(50, 9_000))
    assert not processors.are_busy()
    clock.advance(WINDOW_S)
    assert processors.are_busy()


@pytest.mark.parametrize("text", ["", "cpu a b c", "cpu 1 2"])
def test_what_cannot_be_told_holds_nobody_back(
    tmp_path: Path, text: str, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "stat"
    path.write_text(text)
    assert not Processors(VirtualClock(), path).are_busy()
    assert "cannot be told" in caplog.text


def test_this_machine_tells() -> None:
    assert Processors(VirtualClock()).are_busy() in (True, False)
