"""What the ladder's benchmark makes of its samples: bars, and tables that leave nothing out."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

BENCH = Path(__file__).parent.parent / "bench"
MEDIANS = {"warm": 1.0, "thaw": 3.5, "restore": 200.0, "cold": 1300.0}
PROMISED = {
    "container (crun) cold": (0.5, 1, True),
    "container (crun) cold, stretch": (1300.0, 15, False),
    "container (crun) restore of slow": (200.0, 250, True),
    "container (crun) restore of slow, sooner": (1100.0, 900, True),
    "container (crun) thaw of static, added": (2.5, 3, True),
    "container (runc) thaw of apache, added": (2.5, 3, True),
    "sandbox (runsc) cold": (0.5, 1.2, True),
    "microvm (qemu) restore": (6.5, 10, False),
}


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("reactive")


@pytest.fixture
def climbs(bench: Any) -> Any:
    def climb() -> SimpleNamespace:
        samples = {(rung, bench.TABANE): [value] for rung, value in MEDIANS.items()}
        samples["cold", bench.HAND] = [2600.0]
        return SimpleNamespace(samples=samples, why_not={("restore", bench.PEER): "it fell"})

    return {(engine, server): climb() for engine in bench.ENGINES for server in bench.SERVERS}


class Bars(dict[str, Any]):
    def bar(self, what: str, value: float, bar: float, *, unit: str, better: str) -> None:
        self[what] = importlib.import_module("report").Bar(value, bar, unit, better)


def test_each_number_that_is_promised_has_a_bar(bench: Any, climbs: Any) -> None:
    bars = Bars()
    assert bench.add_bars(bars, climbs) == []
    found = {name: (bars[name].value, bars[name].bar, bars[name].reached) for name in PROMISED}
    assert found == PROMISED


def test_what_was_not_measured_is_missed(bench: Any, climbs: Any) -> None:
    del climbs["qemu-microvm", "static"]
    del climbs["runsc", "static"].samples["cold", bench.HAND]
    bars = Bars()
    assert bench.add_bars(bars, climbs) == ["sandbox (runsc) cold", "microvm (qemu) restore"]
    assert "container (crun) cold" in bars


def test_the_page_has_a_line_for_all_that_is_not_there(bench: Any, climbs: Any) -> None:
    page, apps = bench.reactive_page, importlib.import_module("reactive_apps")
    tried = tuple(
        apps.make_one(engine, server, Path("tree"), Path("module"))
        for engine in bench.ENGINES
        for server in bench.SERVERS
    )
    for each in tried:
        if not each.texts or each.engine == "qemu":
            del climbs[each.engine, each.server]
    text = "\n".join(page.tables(tried, climbs, {"qemu": "QEMU is missing"}, {"qemu-microvm"}))
    assert "| container | `crun` | Tabane | 1, 1 | 3.5, 3.5 | 200, 200 | 1,300, 1,300 |" in text
    assert "|  |  | the engine by hand |  |  |  | 2,600, 2,600 |" in text
    assert "- `crun`, restore, systemd and podman: it fell" in text
    assert "- `qemu-microvm`, emulated: emulated, its imports take half a minute" in text
    assert text.count("- `qemu`: QEMU is missing") == 2
    assert text.count("- `wasmtime`: WASI programs only") == 2
