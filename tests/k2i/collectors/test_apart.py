"""Plugins, which may do anything, in processes of their own."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from tabane.errors import EngineError, NotFound, ProtocolError, Refused, TabaneError
from tabane.k2i.collectors import registry
from tabane.k2i.collectors.api import Collector, Reading, Setting
from tabane.k2i.collectors.command import run_here
from tabane.k2i.collectors.dial import NodeDial
from tabane.model import Collect

PLUGIN = """
import os, sys, time
from tabane.k2i.collectors.api import Reading

class Weather:
    def __init__(self, does):
        self.does, self.readings = does, 0

    async def collect(self):
        self.readings += 1
        exec(self.does)
        return [Reading({"reading": self.readings, "pid": os.getpid()}, pid=os.getppid())]

    async def aclose(self):
        pass

def make(setting):
    print("plugins may print")
    return Weather(setting.collect.settings["does"])
"""
ENTRIES = """[tabane.collectors]
weather = weather:make
broken = weather_that_is_not_there:make
nginx = weather:make
"""


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that brings three kinds, one of which works."""
    (tmp_path / "weather.py").write_text(PLUGIN)
    info = tmp_path / "weather-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: weather\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(ENTRIES)
    monkeypatch.syspath_prepend(tmp_path)


Make = Callable[..., Collector]


@pytest.fixture
async def plugin(installed: None) -> AsyncIterator[Make]:
    made: list[Collector] = []

    def make(kind: str = "weather", does: str = "pass") -> Collector:
        collect = Collect(kind, settings={"does": does})
        made.append(registry.make(Setting(collect, NodeDial(), run_here)))
        return made[-1]

    yield make
    for collector in made:
        await collector.aclose()


async def test_its_process_is_kept(plugin: Make) -> None:
    collector = plugin()
    (first,), (second,) = await collector.collect(), await collector.collect()
    assert first == Reading({"reading": 1, "pid": first.facts["pid"]}, pid=os.getpid())
    assert second.facts == first.facts | {"reading": 2}
    await collector.aclose()
    assert not Path(f"/proc/{first.facts['pid']}").exists()


async def test_an_error_is_told_and_it_goes_on(plugin: Make) -> None:
    collector = plugin(does="1 / (self.readings - 1)")
    with pytest.raises(Refused, match="weather: ZeroDivisionError: division by zero"):
        await collector.collect()
    (reading,) = await collector.collect()
    assert reading.facts["reading"] == 2


async def test_one_that_blocks_is_killed_and_started_again(plugin: Make, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    wait = f"open({str(mark)!r}, 'w').write(str(os.getpid())); time.sleep(1000)"
    collector = plugin(does=f"if not os.path.exists({str(mark)!r}): {wait}")
    taking = asyncio.ensure_future(collector.collect())
    while not (mark.exists() and mark.read_text()):  # noqa: ASYNC110 - a file has no event
        await asyncio.sleep(0.01)
    taking.cancel()
    with pytest.raises(asyncio.CancelledError):
        await taking
    assert not Path("/proc", mark.read_text()).exists()
    (reading,) = await collector.collect()
    assert reading.facts["reading"] == 1


@pytest.mark.parametrize(
    ("does", "kind", "sentence"),
    [
        ("os._exit(9)", EngineError, "weather: its process ended with 9"),
        ("os.kill(os.getpid(), 11)", EngineError, "weather: its process ended with -11"),
        ("self.collect = None; exit('bye')", EngineError, "weather: its process ended with 1"),
        ("raise OSError('no sky')", Refused, "weather: no sky"),
        ("os.environ['x'] = 1", Refused, "TypeError"),
        ("self.readings = 'x' * 300_000", ProtocolError, "more than 256 KiB at once"),
        ("self.readings = {}", ProtocolError, "tells what are no facts"),
    ],
)
async def test_what_goes_wrong(
    plugin: Make, does: str, kind: type[TabaneError], sentence: str
) -> None:
    with pytest.raises(kind) as caught:
        await plugin(does=does).collect()
    assert sentence in caught.value.message


async def test_one_that_cannot_be_loaded_says_why(plugin: Make) -> None:
    with pytest.raises(Refused, match="ModuleNotFoundError: No module named 'weather_that_is"):
        await plugin("broken").collect()


@pytest.mark.usefixtures("installed")
async def test_what_cannot_work_is_listed_with_its_reason() -> None:
    kinds = {kind.kind + "/" + kind.source: kind for kind in await registry.list_kinds()}
    assert kinds["redis/tabane"].works
    assert kinds["weather/weather"].works
    assert "No module named" in kinds["broken/weather"].reason
    assert "must choose another name" in kinds["nginx/weather"].reason
    assert not kinds["nginx/weather"].works


@pytest.mark.usefixtures("installed")
async def test_a_kind_that_is_not_there() -> None:
    known = r"known: command, nginx, redis, broken, weather"
    with pytest.raises(NotFound, match=known):
        registry.make(Setting(Collect("snow"), NodeDial(), run_here))
