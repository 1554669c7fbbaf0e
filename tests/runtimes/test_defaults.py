from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tabane.runtimes import DEFAULTS, DRIVERS, Driver
from tabane.runtimes.defaults import all_drivers, render_tables

PAGE = Path(__file__).parents[2] / "docs/defaults.md"
REAL = all_drivers()


def test_all_but_the_fake_are_asked() -> None:
    assert {driver.name for driver in REAL} == DRIVERS.keys() - {"fake"}


@pytest.mark.parametrize("driver", REAL, ids=lambda driver: driver.name)
def test_every_driver_tells_of_every_default(driver: Driver) -> None:
    rows = driver.enforcements()
    assert [row.default for row in rows] == list(DEFAULTS)
    for row in rows:
        assert row.how.strip() == row.how and "|" not in row.how
        assert len(row.how.split()) >= 4, f"{row.default}: {row.how!r} says too little"


def test_the_page_has_the_tables() -> None:
    _, _, rest = PAGE.read_text().partition("<!-- defaults: python -m tabane.runtimes.defaults -->")
    shown, _, _ = rest.partition("<!-- /defaults -->")
    assert shown.strip() == render_tables(REAL), "paste what the command prints"


def test_the_module_prints_the_tables() -> None:
    argv = [sys.executable, "-m", "tabane.runtimes.defaults"]
    done = subprocess.run(argv, capture_output=True, text=True, check=True)
    assert done.stdout == render_tables(REAL) + "\n"
