from __future__ import annotations

import importlib.util
import json
import platform
import sys
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).parent.parent / "bench" / "report.py"


@pytest.fixture(scope="module")
def report() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report", PATH)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["report"] = module
    spec.loader.exec_module(module)
    return module


def test_percentiles_are_interpolated(report: ModuleType) -> None:
    values = [40.0, 10.0, 30.0, 20.0, 50.0]
    assert report.percentile(values, 0) == 10
    assert report.percentile(values, 50) == 30
    assert report.percentile(values, 90) == pytest.approx(46)
    assert report.percentile(values, 100) == 50
    assert report.percentile([7.0], 99) == 7
    with pytest.raises(ValueError, match="nothing was measured"):
        report.percentile([], 50)


def test_a_summary_has_the_tail(report: ModuleType) -> None:
    columns = report.summary([float(value) for value in range(101)])
    assert columns == {"n": 101, "p50": 50, "p90": 90, "p99": 99, "max": 100}


def make_report(module: ModuleType, directory: Path) -> object:
    made = module.Report("wake", "Wake", results=directory)
    made.row(driver="runc", n=50, p50=31.25)
    made.row(driver="crun", n=50, p50=1234.5, note="cold")
    made.bar("runc added ms", 4.0, 5, unit="ms")
    made.bar("sessions", 900, 1000, unit="/s", better="higher")
    return made


def test_results_are_written_in_full(
    report: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[object] = []
    monkeypatch.setattr(report.Report, "_draw", lambda self, plot: drawn.append(plot))
    made = make_report(report, tmp_path)
    assert made.finish() == 1, "one bar is missed"
    written = json.loads((tmp_path / "wake.json").read_text())
    assert set(written) == {"name", "machine", "rows", "bars"}
    assert written["name"] == "wake"
    assert written["rows"] == made.rows
    assert written["bars"] == {
        "runc added ms": {"value": 4.0, "bar": 5, "unit": "ms", "better": "lower"},
        "sessions": {"value": 900, "bar": 1000, "unit": "/s", "better": "higher"},
    }
    assert len(drawn) == 1


def test_a_bar_that_is_just_reached_passes(report: ModuleType) -> None:
    assert report.Bar(5, 5, "ms").reached
    assert not report.Bar(5.01, 5, "ms").reached
    assert report.Bar(5, 5, "/s", "higher").reached
    assert not report.Bar(4.99, 5, "/s", "higher").reached


def test_what_is_printed(
    report: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(report.Report, "_draw", lambda self, plot: None)
    make_report(report, tmp_path).finish()
    _, *lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "",
        "driver   n    p50  note",
        "runc    50   31.2",
        "crun    50  1,234  cold",
        "",
        "pass  runc added ms  4 ms (at most 5)",
        "MISS  sessions       900 /s (at least 1000)",
    ]


def test_the_machine_is_described_without_its_name(report: ModuleType) -> None:
    machine = report.describe_machine()
    assert set(machine) == {"cpu", "cores", "memory_gib", "kernel", "python"}
    assert machine["cores"] >= 1 and machine["memory_gib"] > 0
    assert platform.node() not in machine.values()
